"""Registering our models takes no name from timm and warns of nothing."""

import json
import subprocess
import sys

import timm

import backbones

CODE = """
import json, warnings
import timm
before = timm.list_models()
owner = {name: timm.model_entrypoint(name).__module__ for name in before}
groups = set(timm.list_modules())
warnings.simplefilter("error")
import backbones
print(json.dumps({
    "lost": [name for name in before if not timm.is_model(name) or timm.model_entrypoint(name).__module__ != owner[name]],
    "added": [name for name in timm.list_models() if name not in owner],
    "ours": backbones.list_models(),
    "merged": sorted(groups & {timm.model_entrypoint(name).__module__.split(".")[-1] for name in backbones.list_models()}),
}))
"""


def test_the_import_adds_our_names_and_changes_none_of_timms():
    done = subprocess.run([sys.executable, "-W", "error", "-c", CODE], capture_output=True, text=True)
    if done.returncode and "import backbones" not in done.stderr:  # a library's own import may warn; ours may not
        done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["lost"] == []
    assert seen["added"] == seen["ours"] == backbones.list_models()
    # timm groups models by the last part of the module's name; only PiT's file shares one with timm, whose names start alike
    assert set(seen["merged"]) <= {"pit"}


def test_filters_and_tags_are_timms():
    assert backbones.list_models("poolformer_s*") == ["poolformer_s12_gn", "poolformer_s24_gn", "poolformer_s36_gn"]
    assert backbones.list_models("resnet*") == []
    assert "dinat_large.in22k" in timm.list_pretrained("dinat_large*")
