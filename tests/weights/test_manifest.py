"""The manifest is complete, consistent and what timm sees."""

import re

import families
import pytest
import timm

import backbones
import weights
from weights import manifest
from weights.fetch import file_name

ALL = {f"{c['name']}.{c['tag']}": c for c in manifest.checkpoints()}
ENTRIES = {name: entry for name, entry in ALL.items() if "url" in entry or "by_hand" in entry}


def test_every_model_has_a_checkpoint_or_says_that_there_is_none():
    assert not [name for name in backbones.list_models() if not manifest.find(name)]
    assert all("published no weights" in entry["note"] for name, entry in ALL.items() if name not in ENTRIES)
    without = {families.file_of(ALL[name]["name"]) for name in ALL.keys() - ENTRIES.keys()}
    assert without == {file for file, row in families.FAMILIES.items() if row.unpublished}


def test_every_checkpoint_belongs_to_a_model():
    assert all(timm.is_model(entry["name"]) for entry in ALL.values())


@pytest.mark.parametrize("entry", [*ENTRIES.values(), *manifest.files()], ids=lambda entry: f"{entry['name']}.{entry['tag']}")
def test_a_checkpoint_states_where_it_is_and_under_which_terms(entry):
    assert ("url" in entry) != ("by_hand" in entry)
    assert entry["license"] in ("mit", "apache-2.0", "nvidia-source-code-nc", "non-commercial (monodepth2)", "none stated")
    assert re.fullmatch(r"github\.com/[\w.-]+/[\w.-]+ @ [0-9a-f]{7,}", entry["source"])
    assert re.fullmatch(r"\d{4}\.\d{5}", entry["paper"])
    if "url" in entry:
        assert re.fullmatch(r"https://\S+\.(pth|pth\.tar|safetensors|bin)", entry["url"])
        assert not re.search(r"drive\.google|1drv\.ms|onedrive", entry["url"]), "a program cannot download this: use by_hand"
    else:
        assert re.search(r"\.(pth|tar|safetensors|bin)$", entry["file_name"]), "state the file's name"
    assert re.fullmatch("[0-9a-f]{64}", entry.get("sha256", "0" * 64))


@pytest.mark.parametrize("name", ENTRIES)
def test_a_checkpoint_states_its_score_and_preprocessing(name):
    entry = ENTRIES[name]
    if entry.get("num_classes", 1000) == 1000:
        assert 69 < entry["published"]["top1"] < 90
    assert entry["input_size"][0] == 3 and entry["interpolation"] in ("bicubic", "lanczos") and 0.8 < entry["crop_pct"] <= 1


@pytest.mark.parametrize("name", ENTRIES)
def test_timm_sees_the_checkpoint(name):
    entry, cfg = ENTRIES[name], timm.get_pretrained_cfg(name)
    assert cfg.url == entry.get("url", entry.get("by_hand"))
    assert cfg.license == entry["license"] and cfg.has_weights
    assert tuple(cfg.input_size) == tuple(entry["input_size"]) and cfg.crop_pct == entry["crop_pct"]
    assert cfg.first_conv and cfg.classifier and cfg.origin_url and cfg.paper_ids
    assert name in timm.list_pretrained(f"{entry['name']}*")


def test_two_checkpoints_share_a_file_name_only_if_they_are_one_file():
    files = {}
    for entry in [*ENTRIES.values(), *manifest.files()]:
        files.setdefault(file_name(entry), set()).add(entry.get("url", entry.get("by_hand")))
    assert not {name: places for name, places in files.items() if len(places) > 1}


def test_further_files_name_their_backbone_and_head():
    from heads import HEADS

    for entry in manifest.files():
        assert timm.is_model(entry["backbone"]) and entry.get("head", "fpn") in HEADS and entry["published"]
    assert manifest.find("upernet_swin_t")["published"]["miou"] == 44.51
    assert weights.fetch.__globals__["file_name"](manifest.find("upernet_nat_mini")) == "nat_mini_upernet.pth"


def test_known_hashes_are_those_of_the_published_files():
    known = {entry["name"]: entry["sha256"][:8] for entry in [*ENTRIES.values(), *manifest.files()] if "sha256" in entry}
    assert known == {"pit_ti": "73aec1d2", "pit_b": "03adf857", "dinov2_vits14_reg4": "f4331770"}


def test_the_first_tag_is_the_default():
    for entry in manifest.read().values():
        for name, tags in entry["models"].items():
            if name in backbones.list_models():
                assert timm.get_pretrained_cfg(name).tag == next(iter(tags))


def test_find_knows_tags_and_says_nothing_of_unknown_ones():
    assert manifest.find("poolformer_s12_gn", "sail_in1k")["published"] == {"top1": 77.2}
    assert manifest.find("poolformer_s12_gn", "nonesuch") == {} == manifest.find("nonesuch")
