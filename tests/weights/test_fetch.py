"""Finding, downloading and verifying published files, with addresses of this machine only."""

import hashlib

import pytest
import timm
import torch

import backbones  # noqa: F401
import weights
from backbones.poolformer import PoolFormer
from weights import manifest
from weights.convert import poolformer as convert

SMALL = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A function that puts a small checkpoint on a "server" and lists it as the manifest's only one; returns (entry, state)."""
    monkeypatch.setenv("ZOO_WEIGHTS", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))

    def publish(num_classes: int = 1000, **fields) -> tuple[dict, dict]:
        model = PoolFormer(**SMALL, num_classes=num_classes)
        state = convert.to_official(model.state_dict(), model)
        (tmp_path / "server").mkdir(exist_ok=True)
        torch.save(state, tmp_path / "server" / "published.pth")
        entry = {"name": "poolformer_s12_gn", "tag": "sail_in1k", "url": f"file://{tmp_path}/server/published.pth"} | fields
        if "by_hand" in entry:
            entry.pop("url")
        monkeypatch.setattr(manifest, "find", lambda name, tag=None: entry if name == entry["name"] else {})
        return entry, state

    return publish


def sha256(path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_file_is_downloaded_once_and_verified(published, tmp_path):
    entry, _ = published()
    entry["sha256"] = sha256(tmp_path / "server" / "published.pth")
    path = weights.fetch("poolformer_s12_gn", progress=False)
    assert path == tmp_path / "cache" / "published.pth"
    (tmp_path / "server" / "published.pth").unlink()
    assert weights.fetch("poolformer_s12_gn", progress=False) == path


def test_a_file_is_found_in_torchs_hub_folder_too(published, tmp_path):
    published()
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    (tmp_path / "server" / "published.pth").rename(tmp_path / "hub" / "checkpoints" / "published.pth")
    assert weights.fetch("poolformer_s12_gn") == tmp_path / "hub" / "checkpoints" / "published.pth"


def test_a_wrong_hash_refuses_a_download_and_a_found_file(published, tmp_path):
    published(sha256="0" * 64)
    with pytest.raises(
        ValueError, match=f"is not the published file: its sha256 is .*, not {'0' * 64}; the download was deleted"
    ):
        weights.fetch("poolformer_s12_gn", progress=False)
    assert not (tmp_path / "cache" / "published.pth").exists()
    (tmp_path / "server" / "published.pth").rename(tmp_path / "cache" / "published.pth")
    with pytest.raises(ValueError, match="is not the published file.* delete it and fetch it again from file://"):
        weights.fetch("poolformer_s12_gn")
    assert (tmp_path / "cache" / "published.pth").exists()


def test_a_failed_download_says_which_file_to_put_where(published, tmp_path):
    published(url=f"file://{tmp_path}/nowhere/absent.pth")
    with pytest.raises(FileNotFoundError, match=r"could not download file://.*absent.pth .* by hand, then put it at .*cache"):
        weights.fetch("poolformer_s12_gn", progress=False)


def test_a_file_that_no_program_can_download_says_where_a_person_finds_it(published, tmp_path):
    published(by_hand="https://drive.example/folder", file_name="published.pth")
    expected = r"published.pth is published at https://drive.example/folder .*put it at .*cache/published.pth"
    with pytest.raises(FileNotFoundError, match=expected):
        weights.fetch("poolformer_s12_gn")
    (tmp_path / "cache").mkdir()
    (tmp_path / "server" / "published.pth").rename(tmp_path / "cache" / "published.pth")
    assert weights.fetch("poolformer_s12_gn").name == "published.pth"


def test_weights_that_nobody_published_are_refused_with_the_reason():
    for create in (
        lambda: weights.fetch("sparsifiner_deit_s"),
        lambda: timm.create_model("sparsifiner_deit_s", pretrained=True),
    ):
        with pytest.raises(ValueError, match="authors published no weights; training starts from DeiT-S"):
            create()


def test_an_unknown_checkpoint_is_named(published):
    published()
    with pytest.raises(ValueError, match="no checkpoint nonesuch.tag"):
        weights.fetch("nonesuch", "tag")


def test_files_of_one_name_on_a_hub_get_names_of_their_own():
    entry = {"name": "pit_s", "tag": "in1k", "url": "https://hub/pit_s/resolve/main/model.safetensors"}
    assert weights.fetch.__globals__["file_name"](entry) == "pit_s.in1k.safetensors"


@pytest.mark.parametrize(
    "create", [{}, {"num_classes": 3}, {"features_only": True}, {"in_chans": 1}, {"num_classes": 0}], ids=str
)
def test_pretrained_models_hold_the_published_weights(published, monkeypatch, create):
    entry, state = published()
    entry["url"] = timm.get_pretrained_cfg("poolformer_s12_gn").url
    copy = published()[0]["url"]
    monkeypatch.setattr(manifest, "find", lambda name, tag=None: entry)
    download = torch.hub.download_url_to_file
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda url, target, **k: download(copy, target, **k))
    state = weights.open_checkpoint(copy.removeprefix("file://"))
    model = timm.create_model("poolformer_s12_gn", pretrained=True, **SMALL, **create)
    model = weights.convert.backbone(model)
    expected = state["patch_embed.proj.weight"]
    expected = expected.sum(1, keepdim=True) if "in_chans" in create else expected
    torch.testing.assert_close(model.patch_embed.weight, expected)
    assert torch.equal(model.stages[2].blocks[0].mlp.fc1.weight, state["network.4.0.mlp.fc1.weight"])
    assert torch.equal(model.stages[1].downsample.weight, state["network.1.proj.weight"])
    if create in ({}, {"in_chans": 1}):
        assert torch.equal(model.head.fc.weight, state["head.weight"])


def test_a_users_own_address_and_file_are_not_held_against_the_manifest(published, tmp_path):
    _, state = published(sha256="0" * 64)
    (tmp_path / "server" / "published.pth").rename(tmp_path / "server" / "own.pth")
    for overlay in ({"url": f"file://{tmp_path}/server/own.pth"}, {"file": str(tmp_path / "server" / "own.pth")}):
        model = timm.create_model("poolformer_s12_gn", pretrained=True, pretrained_cfg_overlay=overlay, **SMALL)
        assert torch.equal(model.head.fc.weight, state["head.weight"])
    with pytest.raises(FileNotFoundError, match="absent.pth, which does not exist"):
        timm.create_model("poolformer_s12_gn", pretrained=True, pretrained_cfg_overlay={"file": "absent.pth"}, **SMALL)


def test_an_unstated_number_of_classes_is_read_from_the_file(published, monkeypatch):
    entry, state = published(num_classes=13, classes_from_file=True)
    monkeypatch.setattr(weights.overlay.__globals__["manifest"], "find", lambda name, tag=None: entry)
    overlay = weights.overlay("poolformer_s12_gn", pretrained_cfg={"url": entry["url"], "tag": "sail_in1k"})
    assert overlay["num_classes"] == 13
    cfg = {"url": entry["url"], "tag": "sail_in1k", "first_conv": "patch_embed", "classifier": "head.fc"}
    model = timm.create_model("poolformer_s12_gn", pretrained=True, pretrained_cfg=cfg, **SMALL)
    assert torch.equal(model.head.fc.weight, state["head.weight"])
