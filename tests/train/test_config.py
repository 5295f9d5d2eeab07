"""The configuration is checked before anything is built, and says what would be right."""

import pytest
import yaml

from train import config, recipes

QUICK = "quickstart"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--optim.lrr=1", "optim: unknown key 'lrr' for OptimConfig; did you mean 'lr'"),
        ("--modle.head=fpn", "unknown section 'modle'.*did you mean 'model'"),
        ("--model.backbone=nat_minii", "unknown model 'nat_minii'; did you mean 'nat_mini'"),
        ("--model.backbone=swin_b.in22k", "swin_b has no weights 'in22k'; did you mean 'ms_in22k'"),
        ("--model.head=upernett", "model.head: unknown name 'upernett'; did you mean 'upernet'"),
        ("--model.head_args.witdh=3", "model.head_args: unknown key 'witdh' for UPerNet; did you mean 'width'"),
        ("--task.name=segmentatoin", "task.name: unknown name 'segmentatoin'; did you mean 'segmentation'"),
        ("--task.num_class=3", "task: unknown key 'num_class' for Segmentation; did you mean 'num_classes'"),
        ("--task.losses={crossentropy: {}}", "task.losses: unknown name 'crossentropy'; did you mean 'cross_entropy'"),
        ("--data.name=scene", "data.name: unknown name 'scene'; did you mean 'scenes'"),
        ("--data.args.conut=3", "data.args: unknown key 'conut' for Scenes; did you mean 'count'"),
        ("--data.root=somewhere", "data.root: scenes is made in memory"),
        ("--optim.name=adamww", "optim.name: unknown name 'adamww'; did you mean 'adamw'"),
        ("--optim.lr=fast", "optim.lr: 'fast' is not float"),
        ("--optim.steps=2.5", "optim.steps: 2.5 is not"),
        ("--data.size=96", "data.size: 96 is not"),
        ("--run.compile=maybe", "run.compile: 'maybe' is not bool"),
        ("--run.precision=fp32", "run.precision: 'fp32' is not"),
        ("--optim.epochs=3", "give optim.steps or optim.epochs"),
        ("--optim.lr=-1", "optim.lr must be positive, got -1"),
        ("--augment.auto_augment=rand-m9", "auto_augment is for classification only"),
        ("--infer.mode=slide", "infer.window is missing"),
        ("--lr=3", "cannot read '--lr=3'"),
    ],
)
def test_a_mistake_is_named_with_what_would_be_right(override, message):
    with pytest.raises(ValueError, match=message):
        config.load(QUICK, [override])


def test_an_unknown_configuration_names_the_nearest():
    with pytest.raises(FileNotFoundError, match="did you mean 'quickstart'"):
        config.load("quikstart")
    with pytest.raises(FileNotFoundError, match="no configuration file nowhere.yaml"):
        config.load("nowhere.yaml")


def test_text_becomes_the_number_it_spells():
    loaded = config.load(QUICK, ["--optim.lr=1e-4", "--optim.clip_norm=5e0", "--data.size=[64, 96]"])
    assert loaded.optim.lr == 1e-4 and loaded.optim.clip_norm == 5.0 and loaded.data.size == (64, 96)


def test_overrides_reach_arguments_of_named_classes():
    loaded = config.load(QUICK, ["--data.args.count=12", "--model.backbone_args.embed_dim=16", "--model.head_args.width=24"])
    assert loaded.data.args["count"] == 12 and loaded.model.backbone_args["embed_dim"] == 16
    assert loaded.model.head_args["width"] == 24


def test_a_data_set_of_files_needs_its_folder():
    values = {"task": {"name": "classification", "num_classes": 10}, "data": {"name": "cifar10"}, "optim": {"steps": 1}}
    with pytest.raises(ValueError, match="data.root is missing: cifar10"):
        config.resolve(values)


def test_a_missing_argument_is_named():
    with pytest.raises(ValueError, match="task: Segmentation needs 'num_classes'"):
        config.resolve({"task": {"name": "segmentation"}, "optim": {"steps": 1}})


@pytest.mark.parametrize("name", recipes.shipped())
def test_what_is_printed_loads_as_the_same_configuration(name, tmp_path):
    loaded = config.load(name)
    (tmp_path / "again.yaml").write_text(config.as_yaml(loaded))
    assert config.as_dict(config.load(str(tmp_path / "again.yaml"))) == config.as_dict(loaded)


def test_the_run_folder_follows_the_name():
    assert config.load(QUICK).run.dir == "runs/quickstart"
    assert config.load(QUICK, ["--run.dir=elsewhere"]).run.dir == "elsewhere"


def test_differences_are_listed_by_key():
    old, new = config.as_dict(config.load(QUICK)), config.as_dict(config.load(QUICK, ["--optim.lr=0.5", "--data.args.seed=3"]))
    lines = config.difference(old, new)
    assert lines == ["data.args.seed: 0 -> 3", f"optim.lr: {old['optim']['lr']} -> 0.5"]


def test_a_file_that_is_no_configuration_is_refused(tmp_path):
    (tmp_path / "list.yaml").write_text("[1, 2]")
    with pytest.raises(ValueError, match="expected sections"):
        config.load(str(tmp_path / "list.yaml"))
    (tmp_path / "broken.yaml").write_text("task: {")
    with pytest.raises(ValueError, match="not valid YAML"):
        config.load(str(tmp_path / "broken.yaml"))


def test_yaml_runs_no_code(tmp_path):
    (tmp_path / "code.yaml").write_text("task: !!python/object/apply:os.getcwd []")
    with pytest.raises(ValueError, match="not valid YAML"):
        config.load(str(tmp_path / "code.yaml"))


def test_help_lists_every_key_with_its_meaning():
    text = config.keys_help()
    for section, content in yaml.safe_load(config.as_yaml(config.load(QUICK))).items():
        if section != "task":
            for key in content:
                assert f"--{section}.{key}" in text, f"{section}.{key}"
    assert "images per optimiser step over all processes" in " ".join(text.split())


def test_no_is_a_precision_and_not_a_boolean(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("task: {name: segmentation, num_classes: 6}\noptim: {steps: 1}\nrun: {precision: no, compile: false}\n")
    loaded = config.load(str(path))
    assert (loaded.run.precision, loaded.run.compile) == ("no", False)
    assert config.load(str(path), ["--run.precision=no", "--run.compile=true"]).run.compile is True
    with pytest.raises(ValueError, match=r"run\.precision: 'fp8' is not one of no, bf16, fp16"):
        config.load(str(path), ["--run.precision=fp8"])
