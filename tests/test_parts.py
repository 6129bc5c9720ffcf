"""Parts of networks by name: the same network as with the function itself; a wrong name is one line."""

import pytest
import torch

import mgic
from mgic import MGICBlock, Scheme, UserError
from mgic.hierarchy import plan_groups
from mgic.models.parts import PARTS
from mgic.models.resnet import MGIC_RESNET
from mgic.training import Recipe

SMALL = {"group_size": 4, "coarsest": 8}


def same(one, other):
    other.load_state_dict(one.state_dict())
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(one.eval()(x), other.eval()(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "said", "meant"),
    [
        ("mgic_resnet20", {"correction": "plain_prolongation"}, {"correction": mgic.plain_prolongation}),
        ("mgic_resnet20", {"block": "PreActBasicBlock"}, {"block": mgic.blocks.PreActBasicBlock}),
        (
            "mgic_resnet20",
            {"scheme": {"cycle": "additive", "norm": "Identity"}},
            {"scheme": Scheme(MGIC_RESNET.plan, norm=torch.nn.Identity, cycle=mgic.additive)},
        ),
        ("mgiad20", {"correction": "plain_prolongation"}, {"correction": mgic.plain_prolongation}),
        ("mgnet20", {"coarsen": "ResidualOnly"}, {"coarsen": mgic.smoothing.ResidualOnly}),
    ],
)
def test_a_name_means_the_function(name, said, meant):
    sizes = SMALL if "scheme" in said or name == "mgic_resnet20" else {}
    same(mgic.create_model(name, **said, **sizes), mgic.create_model(name, **meant, **sizes))


def test_every_name_is_that_of_a_public_function_or_class():
    for parts in PARTS.values():
        assert all(part.__name__ == name for name, part in parts.items())


def test_a_scheme_keeps_what_is_left_unsaid():
    def blocks(**scheme):
        model = mgic.create_model("mgic_resnet20", group_size=8, coarsest=16, scheme=scheme)
        return [m for m in model.modules() if isinstance(m, MGICBlock)]

    assert [len(block.levels) for block in blocks(cycle="additive")] == [2] * 3 + [2] * 3 + [3] * 3  # minimum=1 stays
    assert [len(block.levels) for block in blocks(plan={"maximum": 1})] == [2] * 9
    assert [len(block.levels) for block in blocks(plan={"extra": 1})] == [2] * 3 + [3] * 3 + [4] * 3
    assert not any(
        p.requires_grad for block in blocks(transfer="frozen_averaging_pair") for p in block.restrict.parameters()
    )


def test_groups_alone_do_not_couple_the_groups():
    model = mgic.create_model("mgic_resnet20", group_size=8, coarsest=16, scheme={"plan": "plan_groups"})
    *_, last = (m for m in model.modules() if isinstance(m, MGICBlock))
    assert [(level.channels, level.groups) for level in last.levels] == [(64, 8)]
    assert (last.to_dense()[0, :8, 8:] if last.to_dense().dim() > 2 else last.to_dense()[:8, 8:]).abs().max() == 0
    assert [level.groups for level in plan_groups(16, 8, 16)] == [1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"correction": "tau_corection"}, "correction has no 'tau_corection'; did you mean tau_correction"),
        ({"scheme": {"cycle": "w"}}, "scheme: cycle has no 'w'; it has multiplicative, additive"),
        ({"scheme": {"circle": "additive"}}, "scheme has no 'circle'; it has plan, transfer, norm, cycle"),
        ({"scheme": {"plan": {"most": 1}}}, "scheme: plan has no 'most'; it has .*maximum"),
        ({"scheme": {"plan": "plans"}}, "scheme: plan has no 'plans'"),
        ({"scheme": "additive"}, "scheme must be a Scheme or a mapping such as .*, got 'additive'"),
        ({"scheme": {"cycle": 5}}, "scheme: cycle must be a function or the name of one .*, got 5"),
        ({"scheme": {"transfer": None}}, "scheme: transfer must be a function or the name of one .*, got None"),
        ({"correction": 5}, "correction must be a function or the name of one .*, got 5"),
    ],
)
def test_a_wrong_name_is_one_line(arguments, words):
    with pytest.raises(UserError, match=words) as error:
        mgic.create_model("mgic_resnet20", **arguments)
    assert "\n" not in str(error.value)


def test_a_recipe_may_name_parts():
    recipe = Recipe(
        model_args={"scheme": {"cycle": "additive", "plan": {"maximum": 1}}, "correction": "plain_prolongation"}
    )
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    mgic.create_model(recipe.model, **recipe.model_args)
