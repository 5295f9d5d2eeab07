"""`zoo bench claims`: contenders of one size beside each other; what is counted is the papers' numbers."""

import functools

import pytest

from train.bench import claims


def test_the_attentions_map_the_same_and_stand_beside_the_first():
    calls = claims.attentions(14, "cpu", dim=32, heads=4)
    assert {tuple(call().shape) for call in calls.values()} == {(1, 14, 14, 32)}
    short = claims.Claim("said", functools.partial(claims.attentions, 14, dim=32, heads=4), "a paper")
    rows = claims.bench_claims(rounds=2, claims=[short])
    assert [row["contender"] for row in rows] == ["HiLo", "spatial reduction", "windows of 7"]
    assert [row["times the first's time"] != "" for row in rows] == [False, True, True]
    assert rows[0]["claim"] == "said (a paper)"


def test_networks_are_built_for_their_size_and_folded_where_asked():
    calls = claims.networks((("test_vit", 160, True), ("test_vit", 160, False)), "cpu")
    assert list(calls) == ["test_vit, folded at 160", "test_vit at 160"]
    assert all(call().shape == (1, 1000) for call in calls.values())


@pytest.mark.parametrize("claim", claims.CLAIMS, ids=lambda claim: claim.title[:30])
def test_every_claim_names_models_that_exist(claim):
    import timm

    for name, side, _ in claim.make.args[0] if claim.make.func is claims.networks else ():
        assert timm.is_model(name) and side >= 224


def test_metaformers_savings_are_those_of_the_paper():
    ((row, *_),) = [claims.count_claims(claims.COUNTS[:1])]
    assert (row["fewer"], row["fewer "]) == ("35 %", "50 %")
