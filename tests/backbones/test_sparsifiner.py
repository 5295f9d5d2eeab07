"""Sparsifiner against the authors' code."""

import math

import golden
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import get_notrace_functions, get_notrace_modules
from torch import fx, nn
from torchvision.models.feature_extraction import NodePathTracer

import backbones  # noqa: F401
import weights
from backbones.sparsifiner import Block, MaskPredictor, Sparsifiner, restore, take
from train.tasks import TASKS
from train.tasks.sparsifiner import DISTILLATION, RECONSTRUCTION, loss_terms
from weights.convert import sparsifiner as convert

TINY = {"img_size": 40, "patch_size": 8, "embed_dim": 24, "depth": 3, "heads": 3, "mlp_ratio": 2, "num_classes": 5}
TINY |= {"reduce_n": 3, "coef_top": 3}


def thresholds(cfg: dict) -> dict:
    """The predictor's arguments that the authors' configuration describes."""
    coef, score = "SPAR.BASIS_COEF", "SPAR.ATTN_SCORE"
    return {
        "basis_threshold": cfg["SPAR.BASIS_THRESHOLD"],
        "coef_top": cfg[f"{coef}.TOPK"] if cfg[f"{coef}.USE_TOPK"] else 0,
        "coef_threshold": cfg[f"{coef}.THRESHOLD"],
        "score_threshold": None if cfg[f"{score}.USE_TOPK"] else cfg[f"{score}.THRESHOLD"],
    }


def reductions(kwargs: dict) -> dict:
    names = {"reduce_n": "reduce_n_factor", "reduce_c": "reduce_c_factor", "share_proj": "share_inout_proj"}
    return {ours: kwargs[theirs] for ours, theirs in names.items()}


def square(tokens: int) -> tuple[int, int]:
    side = math.isqrt(tokens - 1)
    return side, side


def model_from_official(info: dict, kwargs: dict, teacher: bool = False) -> Sparsifiner:
    """The model that the authors' constructor arguments describe; a teacher has no predictors."""
    names = ["img_size", "patch_size", "num_classes", "embed_dim", "depth", "mlp_ratio"]
    args = {name: kwargs[name] for name in names} | {"heads": kwargs["num_heads"], "lvvit": "LVViT" in info["official_class"]}
    if teacher:
        return Sparsifiner(**args, dense=True)
    args |= {"keep_rate": kwargs["attn_keep_rate_list"], "token_keep_rate": kwargs.get("token_keep_rate_list", 1.0)}
    return Sparsifiner(**args, **reductions(kwargs), **thresholds(info["cfg"]))


def compare(got: dict, stored: dict, info: dict) -> None:
    assert stored.keys() <= got.keys(), stored.keys() - got.keys()
    for key, value in stored.items():
        ours = got[key].detach().to(value.dtype)
        torch.testing.assert_close(ours, value, **golden.tolerance(info), msg=lambda m, key=key: f"{key}: {m}")


def maps(block, alive=None) -> dict:
    """A block's maps by the fixtures' names; the rows of dropped queries, whose choice is a tie, as zeros."""
    names = ["approx_attn", "attn_mask", "masked_attn", "basis_coef", "unmasked_attn", "token_mask"]
    return {f"stage/{name}": kept_rows(getattr(block, name), alive) for name in names if getattr(block, name) is not None}


def kept_rows(value: torch.Tensor, alive: torch.Tensor | None) -> torch.Tensor:
    if alive is None or value.ndim != 4:
        return value
    return value * alive[:, None, -value.shape[2] :, None]


def stored_tensors(tensors: dict) -> dict:
    return {k: v for k, v in tensors.items() if k == "output" or k.startswith("stage/")}


def of_class(name: str) -> list:
    cases = [case for case in golden.cases("sparsifiner") if isinstance(case, str)]
    found = [case for case in cases if golden.load(case)[0]["official_class"] == name]
    return found or [pytest.param(None, marks=pytest.mark.skip(reason=f"no fixture of {name}"))]


@pytest.mark.parametrize("case", of_class("MaskPredictor"))
def test_the_predictor_is_reproduced(case):
    info, tensors = golden.load(case)
    kwargs, grid = info["kwargs"], square(info["kwargs"]["num_tokens"])
    rest = reductions(kwargs) | thresholds(info["cfg"])
    module = MaskPredictor(kwargs["dim"], kwargs["num_heads"], grid, kwargs["attn_keep_rate"], **rest).eval()
    module.load_state_dict(golden.state(tensors))
    mask, scores, coef, basis = module(tensors["input/q"], tensors["input/k"], grid)
    mask = F.pad(mask, (0, 0, 1, 0), value=True)
    zeros = {"basis": basis == 0, "basis_coef": coef == 0, "attn_mask": ~mask}
    got = {"output": mask, "stage/approx_attn": scores, "stage/basis_coef": coef}
    compare(got | {f"stage/{k}_sparsity": v.float().mean() for k, v in zeros.items()}, stored_tensors(tensors), info)
    assert not mask.requires_grad


@pytest.mark.parametrize("case", of_class("Block"))
def test_the_block_is_reproduced_and_removing_tokens_changes_nothing(case):
    info, tensors = golden.load(case)
    kwargs, grid, x = info["kwargs"], square(info["kwargs"]["num_tokens"]), tensors["input"]
    predictor = {"grid": grid, "keep_rate": kwargs["attn_keep_rate"]} | reductions(kwargs) | thresholds(info["cfg"])
    rate = kwargs["token_keep_rate"] if kwargs["token_pruning_this_layer"] else None
    block = Block(kwargs["dim"], kwargs["num_heads"], kwargs["mlp_ratio"], kwargs["qkv_bias"], 1e-6, predictor, rate).eval()
    block.load_state_dict(golden.state(tensors))
    alive = tensors.get("input/prev_token_mask")
    alive = None if alive is None else F.pad(alive.bool(), (1, 0), value=True)
    with torch.no_grad():
        out, details, _ = block.detailed(x, grid, alive)
        kept = None if alive is None else torch.argsort(alive.int(), dim=1, descending=True, stable=True)[:, : alive[0].sum()]
        removed, left = block(x if kept is None else take(x, kept), grid, kept)
    stored = {key: kept_rows(value, alive) for key, value in stored_tensors(tensors).items()}
    compare(maps(details, alive) | {"output": out}, stored, info)
    torch.testing.assert_close(restore(removed, left, grid), tensors["output"], **golden.tolerance(info))
    assert rate is None or removed.shape[1] == 1 + math.ceil(rate * grid[0] * grid[1])


@pytest.mark.parametrize("case", of_class("Sparsifiner") + of_class("SparsifinerLVViT"))
def test_the_model_is_reproduced_with_all_its_masks(case):
    info, tensors = golden.load(case)
    model = model_from_official(info, info["kwargs"]).eval()
    weights.load_checkpoint(model, golden.state(tensors))
    x = tensors["input"]
    with torch.no_grad():
        details, logits, features = model.details(x), model(x), model.forward_features(x)
    got = {"output": details.logits, "stage/features": details.features}
    got |= {f"stage/{name}_sparsity": value for name, value in details.sparsity().items()}
    stored, alive = stored_tensors(tensors), None
    for i, block in enumerate(details.blocks):
        got |= {key.replace("stage/", f"stage/{i}/"): value for key, value in maps(block, alive).items()}
        stored |= {k: kept_rows(v, alive) for k, v in stored.items() if k.startswith(f"stage/{i}/")}
        alive = None if block.token_mask is None else F.pad(block.token_mask, (1, 0), value=True)
    compare(got, stored, info)
    compare({"output": logits}, {"output": tensors["output"]}, info)  # the plain forward, where dropped tokens are removed
    patches = features[:, 1:] if model.aux_head is None else model.aux_head(features[:, 1:])
    compare({"stage/features": patches}, {"stage/features": tensors["stage/features"]}, info)


@pytest.mark.parametrize("case", golden.cases("sparsifiner_train"))
def test_losses_and_gradients_of_both_training_phases_are_reproduced(case):
    info, tensors = golden.load(case)
    cfg, x = info["cfg"], tensors["input"]
    student = model_from_official(info, info["kwargs"])
    teacher = model_from_official(info, info["teacher_kwargs"], teacher=True)
    weights.load_checkpoint(student, golden.state(tensors))
    weights.load_checkpoint(teacher, golden.state(tensors, "teacher_state/"))
    with torch.no_grad():
        taught = teacher.eval().details(x)
    details = student.train().details(x, reconstruct=cfg["LOSS.USE_ATTN_RECON"])
    factors = {k.split(".")[1].lower(): v for k, v in cfg.items() if k.startswith("LOSS.") and k.endswith(".WEIGHT")}
    terms = loss_terms(details, taught, tensors["input/target"], factors)
    loss = sum(terms.values())
    loss.backward()
    got = {"output": loss, "stage/logits": details.logits}
    got |= {"stage/teacher_logits": taught.logits, "stage/teacher_tokens": taught.features}
    got |= {f"stage/teacher_attn/{i}": block.unmasked_attn for i, block in enumerate(taught.blocks)}
    got |= {f"stage/loss/{name}_loss": value for name, value in terms.items()}
    for i, block in enumerate(details.blocks):
        got |= {key.replace("stage/", f"stage/{i}/"): value for key, value in maps(block).items()}
    got |= {f"grad/{key}": torch.zeros_like(p) if p.grad is None else p.grad for key, p in student.named_parameters()}
    compare(got, {k: v for k, v in tensors.items() if k == "output" or k.startswith(("stage/", "grad/"))}, info)
    recipe = RECONSTRUCTION if cfg["LOSS.USE_ATTN_RECON"] else DISTILLATION
    assert recipe == {name: factor for name, factor in factors.items() if factor}


@pytest.mark.parametrize("case", golden.cases("sparsifiner_train"))
def test_the_training_task_has_the_authors_loss_and_the_gradients_of_its_phase(case, monkeypatch):
    info, tensors = golden.load(case)
    phase = "attn_recon" if info["cfg"]["LOSS.USE_ATTN_RECON"] else "cls_distill"
    task = TASKS["sparsifiner"](num_classes=info["kwargs"]["num_classes"], phase=phase)
    student = model_from_official(info, info["kwargs"]).train()
    task.teacher = model_from_official(info, info["teacher_kwargs"], teacher=True).eval()
    weights.load_checkpoint(student, golden.state(tensors))
    weights.load_checkpoint(task.teacher, golden.state(tensors, "teacher_state/"))
    student.set_training_phase(phase)
    monkeypatch.setattr(task, "soft", lambda label: tensors["input/target"])
    images = tensors["input"]
    batch = {"image": images, "label": torch.zeros(len(images), dtype=torch.long)}
    terms = task.losses(task.forward(student, batch), batch)
    assert terms.keys() == task.counts(batch).keys()
    loss = sum(terms.values())
    loss = loss * (len(images) if phase == "attn_recon" else 1)  # theirs is a sum over the images
    loss.backward()
    got = {"output": loss} | {f"grad/{key}": p.grad for key, p in student.named_parameters() if p.grad is not None}
    assert len(got) == 1 + len(student.phase_parameters(phase))
    compare(got, {key: tensors[key] for key in got}, info)


@pytest.mark.parametrize("variant", golden.variants("sparsifiner"))
def test_every_official_variant_converts_and_converts_back(variant):
    facts = golden.official("sparsifiner")[variant]
    dense = variant.startswith("teacher")
    model = timm.create_model("sparsifiner_lvvit_s" if "lvvit" in variant else "sparsifiner_deit_s", device="meta", dense=dense)
    assert sum(p.numel() for p in model.parameters()) == facts["params"]
    official = {key: torch.empty(shape, device="meta") for key, shape in facts["keys"].items()}
    native = weights.convert_state_dict(official, model)
    assert {k: v.shape for k, v in native.items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert {key: list(value.shape) for key, value in convert.to_official(native, model).items()} == facts["keys"]


def tiny(**kwargs) -> Sparsifiner:
    """A model with every weight off its initial value, large enough that attention is not uniform."""
    torch.manual_seed(0)
    model = Sparsifiner(**TINY | kwargs).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


# ---------------------------------------------------------------- masks


def predictor(**kwargs) -> MaskPredictor:
    torch.manual_seed(0)
    module = MaskPredictor(24, 3, (4, 4), reduce_n=3, **kwargs)
    nn.init.normal_(module.proj_n)
    nn.init.normal_(module.proj_back_n)
    return module


def test_the_budget_is_rounded_up_and_the_class_column_competes():
    mask = predictor(keep_rate=0.25)(torch.randn(2, 3, 17, 8), torch.randn(2, 3, 17, 8), (4, 4))[0]
    assert mask.shape == (2, 3, 16, 17) and (mask.sum(-1) == 5).all()  # 17 / 4 = 4.25
    assert not mask[..., 0].all()


def test_inference_uses_the_absolute_basis_above_its_threshold_and_reconstruction_the_signed_one():
    module, qk = predictor(basis_threshold=0.5), torch.randn(1, 3, 17, 8)
    basis, raw = module(qk, qk, (4, 4))[3], module(qk, qk, (4, 4), raw=True)[3]
    assert torch.equal(raw, module.proj_back_n) and (raw < 0).any()
    assert torch.equal(basis, torch.where(raw.abs() > 0.5, raw.abs(), 0)) and (basis == 0).any()
    coef, raw_coef = module(qk, qk, (4, 4))[2], module(qk, qk, (4, 4), raw=True)[2]
    assert (raw_coef > 0).all() and torch.equal(coef, raw_coef)  # five coefficients are fewer than the top eight


def test_coefficients_are_cut_but_not_renormalised_and_scaled_by_the_number_of_heads():
    module, q, k = predictor(coef_top=2), torch.randn(1, 3, 17, 8), torch.randn(1, 3, 17, 8)
    logits = module.proj_c_q(q[:, :, 1:]) @ (module.proj_c_k(k).mT @ module.proj_n)
    full = (logits * 3**-0.5).softmax(-1)
    coef = module(q, k, (4, 4))[2]
    assert ((coef > 0).sum(-1) == 2).all()
    torch.testing.assert_close(coef, full * (full >= full.topk(2).values[..., -1:]))


def test_queries_without_keys_give_zeros_and_finite_gradients():
    model, x = tiny(score_threshold=1e9).train(), torch.randn(2, 3, 40, 40)
    attention = model.details(x).blocks[0].masked_attn
    assert (attention[:, :, 1:] == 0).all() and (attention[:, :, 0].sum(-1) - 1).abs().max() < 1e-5
    model(x).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    torch.testing.assert_close(model.eval()(x), model.details(x).logits, atol=1e-5, rtol=0)


def test_keeping_everything_is_the_dense_network():
    sparse, dense, x = tiny(keep_rate=1.0), tiny(dense=True), torch.randn(2, 3, 40, 40)
    missing, unexpected = dense.load_state_dict(sparse.state_dict(), strict=False)
    assert not missing and all("mask_predictor" in key for key in unexpected)
    torch.testing.assert_close(sparse(x), dense(x), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(tiny()(x), dense(x), atol=1e-3)
    with pytest.raises(ValueError, match="the model is dense"):
        dense.details(x).sparsity()


# ---------------------------------------------------------------- token pruning


@pytest.mark.parametrize("rates", [(1.0, 0.7, 0.49), (0.5, 0.5, 0.2), (0.1, 0.1, 0.1)])
def test_removed_tokens_give_what_masked_ones_give(rates):
    model, x = tiny(token_keep_rate=rates), torch.randn(2, 3, 40, 40)
    with torch.no_grad():
        details, features = model.details(x), model.forward_features(x)
        torch.testing.assert_close(model(x), details.logits, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(features[:, 1:], details.features, atol=2e-5, rtol=1e-4)
    for block, rate in zip(details.blocks, rates):
        assert block.token_mask is None if rate == 1 else (block.token_mask.sum(1) == math.ceil(rate * 25)).all()


def test_pruned_tokens_are_not_computed():
    model, seen = tiny(token_keep_rate=(0.4, 0.4, 0.2)), []
    for block in model.blocks:
        block.mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    image_maps = model.forward_intermediates(torch.randn(1, 3, 40, 40), intermediates_only=True)
    assert seen == [26, 11, 11]
    assert [(m == 0).all(1).sum().item() for m in image_maps] == [15, 15, 20]


def test_one_number_prunes_in_quarters_as_the_authors_lists_do():
    model = timm.create_model("sparsifiner_deit_s", token_keep_rate=0.7, device="meta")
    rates = [block.token_keep_rate for block in model.blocks]
    assert [i for i, rate in enumerate(rates) if rate] == [3, 6, 9]
    assert rates[3::3] == pytest.approx([0.7, 0.49, 0.343])


# ---------------------------------------------------------------- any size


def test_any_size_and_the_native_one_untouched():
    model = tiny()
    for height, width in [(40, 56), (16, 16), (101, 45)]:
        image = torch.randn(1, 3, height, width)
        out = model.forward_intermediates(image, 1, intermediates_only=True)[0]
        assert out.shape[2:] == (-(-height // 8), -(-width // 8))
        torch.testing.assert_close(model(image), model.details(image).logits, atol=1e-5, rtol=1e-5)
    down, back = model.blocks[0].attn.mask_predictor.matrices((5, 5))
    assert down is model.blocks[0].attn.mask_predictor.proj_n and back is model.blocks[0].attn.mask_predictor.proj_back_n
    with pytest.raises(ValueError, match="16"):
        model(torch.randn(1, 3, 15, 40))


def test_a_finer_grid_sums_to_the_same_and_scores_the_same():
    module = predictor()
    nn.init.constant_(module.proj_n, 2.0)
    nn.init.constant_(module.proj_back_n, 0.3)
    down, back = module.matrices((8, 12))
    torch.testing.assert_close(down[1:].sum(0), module.proj_n[1:].sum(0))
    torch.testing.assert_close(back, torch.full((97, 5), 0.3))


def test_set_input_size_resamples_once_and_changes_no_output():
    model, x = tiny(), torch.randn(1, 3, 64, 48)
    with torch.no_grad():
        before = model(x)
        model.set_input_size((64, 48))
        assert model.blocks[0].attn.mask_predictor.proj_n.shape[0] == model.pos_embed.shape[1] == 49
        torch.testing.assert_close(model(x), before, atol=1e-6, rtol=0)
    shared = tiny(share_proj=True)
    with pytest.raises(ValueError, match="share_proj"):
        shared.set_input_size((64, 48))
    assert shared(x).shape == (1, 5)


@pytest.mark.parametrize("size", [56, (48, 72)])
def test_weights_of_another_size_load_and_keep_their_reduced_tokens(size):
    small, large = tiny(), tiny(img_size=size)
    count = small.blocks[0].attn.mask_predictor.proj_n.shape[1]
    assert large.blocks[0].attn.mask_predictor.proj_n.shape[1] != count
    report = weights.load_checkpoint(large, small.state_dict())
    assert "blocks.0.attn.mask_predictor.proj_back_n" in report.resized
    x = torch.randn(1, 3, *((size, size) if isinstance(size, int) else size))
    torch.testing.assert_close(large(x), small(x), atol=1e-5, rtol=1e-5)
    again = tiny(img_size=size)
    assert not weights.load_checkpoint(again, large.state_dict()).resized
    assert torch.equal(again(x), large(x))
    with pytest.raises(ValueError, match="share_proj"):
        weights.load_checkpoint(tiny(img_size=size, share_proj=True), tiny(share_proj=True).state_dict())


def test_pretrained_weights_load_into_another_size(tmp_path):
    names = {"img_size": 32, "embed_dim": 24, "depth": 2, "heads": 3}
    source = timm.create_model("sparsifiner_deit_s", **names, num_classes=5).eval()
    torch.save({"model": source.state_dict()}, tmp_path / "file.pth")
    overlay = {"file": str(tmp_path / "file.pth"), "num_classes": 5}
    args = names | {"img_size": 64, "num_classes": 5, "pretrained_cfg_overlay": overlay}
    loaded = timm.create_model("sparsifiner_deit_s", pretrained=True, **args).eval()
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(loaded(x), source(x), atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- the two networks


def test_the_networks_have_the_epsilons_and_biases_of_the_released_code():
    deit, lvvit = tiny(), tiny(lvvit=True)
    for model, eps in ((deit, 1e-6), (lvvit, 1e-5)):
        assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {eps}
    assert deit.blocks[0].attn.qkv.bias is not None and lvvit.blocks[0].attn.qkv.bias is None
    assert deit.blocks[0].skip == 1 and lvvit.blocks[0].skip == 2


def test_lvvit_adds_half_the_strongest_auxiliary_logits_at_inference_only():
    model, x = tiny(lvvit=True), torch.randn(2, 3, 40, 40)
    with torch.no_grad():
        tokens = model.forward_features(x)
        plain = model.head(tokens[:, 0])
        torch.testing.assert_close(model(x), plain + 0.5 * model.aux_head(tokens[:, 1:]).max(1).values)
        torch.testing.assert_close(model.train().forward_head(tokens), plain)
    with pytest.raises(ValueError, match="token_keep_rate"):
        tiny(lvvit=True, token_keep_rate=0.5)


@pytest.mark.parametrize("lvvit", [False, True])
def test_every_parameter_gets_a_gradient_and_the_predictors_zero(lvvit):
    model = tiny(lvvit=lvvit).train()
    model(torch.randn(2, 3, 40, 40)).square().sum().backward()
    for name, parameter in model.named_parameters():
        hidden = "mask_predictor" in name or "aux_head" in name
        assert parameter.grad is not None and (parameter.grad == 0).all() == hidden, name
    assert {n for n, _ in model.named_parameters() if "mask_predictor" in n} <= model.no_weight_decay()


def test_the_phases_share_all_parameters_between_them():
    model = tiny()
    first, second = (set(map(id, model.phase_parameters(phase))) for phase in ("attn_recon", "cls_distill"))
    assert not first & second and first | second == set(map(id, model.parameters())) and len(first) == 3 * 6
    with pytest.raises(ValueError, match="attn_recon"):
        model.phase_parameters("both")


@pytest.mark.parametrize("kwargs", [{}, {"lvvit": True}, {"token_keep_rate": 0.5}])
def test_a_traced_model_is_equal(kwargs):
    model, x = tiny(**kwargs), torch.randn(2, 3, 40, 56)
    tracer = NodePathTracer(leaf_modules=list(get_notrace_modules()), autowrap_functions=list(get_notrace_functions()))
    assert torch.equal(fx.GraphModule(model, tracer.trace(model))(x), model(x))


def test_wrong_arguments_raise():
    wrong = [({"keep_rate": 0}, "keep_rate"), ({"keep_rate": (0.2, 0.3)}, "2 values for 3"), ({"token_keep_rate": 1.2}, "rise")]
    wrong += [({"token_keep_rate": (0.5, 0.7, 0.5)}, "rise"), ({"dense": True, "token_keep_rate": 0.5}, "dense")]
    for kwargs, words in wrong:
        with pytest.raises(ValueError, match=words):
            tiny(**kwargs)
    details = tiny().details(torch.randn(1, 3, 40, 40))
    with pytest.raises(ValueError, match="unknown losses.*ratio"):
        loss_terms(details, details, torch.ones(1, 5) / 5, {"ratio": 1.0})
