"""Blocks that add nothing at birth: exact, dense, found from what a model does; and every reason for which there is none."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastmorph as fm


class Block(nn.Module):
    """Pre-norm, two branches, one of them gated."""

    def __init__(self, width: int = 6, inner: int = 10) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.gate, self.down = nn.Linear(width, inner), nn.Linear(width, inner), nn.Linear(inner, width)
        self.scale = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.scale * self.down(torch.tanh(self.gate(h)) * self.up(h))


class Tower(nn.Module):
    def __init__(self, blocks: list[nn.Module], width: int = 6) -> None:
        super().__init__()
        self.blocks, self.depth = nn.ModuleList(blocks), len(blocks)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def tower(*args: int) -> Tower:
    torch.manual_seed(0)
    made = Tower([Block(*args) for _ in range(3)]).double().eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape or (4, 6), generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def numpy_block(block: Block, x: np.ndarray) -> np.ndarray:
    """What the block adds to x, by its definition."""
    named = {name: tensor.detach().numpy() for name, tensor in block.named_parameters()}
    h = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + block.norm.eps)
    h = h * named["norm.weight"] + named["norm.bias"]
    inner = np.tanh(h @ named["gate.weight"].T + named["gate.bias"]) * (h @ named["up.weight"].T + named["up.bias"])
    return named["scale"] * (inner @ named["down.weight"].T + named["down.bias"])


@pytest.mark.parametrize("inner", [10, 7])
def test_a_dense_block_adds_nothing(inner):
    parent, x = tower(6, inner), inputs(50, 6)
    before = parent.state_dict()
    done = fm.morph(parent, fm.InsertBlock("blocks.1"), example_inputs=x)
    new = done.model.blocks[2]
    assert done.certificate
    assert len(done.model.blocks) == 4
    assert done.model.depth == 4
    assert all(torch.equal(before[name], tensor) for name, tensor in parent.state_dict().items())
    assert all((tensor != 0).all() for name, tensor in new.named_parameters() if name != "down.bias")
    assert not new.down.bias.any()
    added = numpy_block(new, x.numpy())  # a sum of `inner` terms that cancel: so many roundings of their size
    assert np.abs(added).max() <= 8 * inner * np.finfo(np.float64).eps * np.abs(numpy_block(parent.blocks[1], x.numpy())).max()


def test_zero_fill_zeroes_the_writers_alone():
    parent = tower()
    child = fm.insert_block(parent, "blocks.0", fill="zero", example_inputs=inputs())
    new = child.blocks[1]
    assert not new.down.weight.any()
    assert not new.down.bias.any()
    assert torch.equal(new.up.weight, parent.blocks[0].up.weight)
    assert torch.equal(child(inputs()), parent(inputs()))


def test_training_parts_the_twins():
    child = fm.insert_block(tower(), "blocks.0", example_inputs=inputs())
    new = child.blocks[1]
    assert torch.equal(new.up.weight[:5], new.up.weight[5:])
    assert torch.equal(new.down.weight[:, :5], -new.down.weight[:, 5:])
    optimizer = torch.optim.SGD(child.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        child(inputs()).square().sum().backward()
        optimizer.step()
    assert ((new.up.weight[:5] - new.up.weight[5:]).abs().amax(1) > 1e-3).all()
    assert not torch.equal(new.down.weight[:, :5], -new.down.weight[:, 5:])


@pytest.mark.parametrize("fill", ["pair", "zero"])
def test_residual_networks_with_batch_norm(fill):
    class Basic(nn.Module):
        def __init__(self, ci: int, co: int) -> None:
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(ci, co, 3, padding=1, bias=False), nn.BatchNorm2d(co)
            self.conv2, self.bn2 = nn.Conv2d(co, co, 3, padding=1, bias=False), nn.BatchNorm2d(co)
            self.down = nn.Conv2d(ci, co, 1) if ci != co else None
            self.relu = nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
            out += x if self.down is None else self.down(x)
            return self.relu(out)

    torch.manual_seed(0)
    parent = nn.Sequential(
        nn.Sequential(Basic(3, 6), Basic(6, 6)), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2)
    ).double()
    x = inputs(4, 3, 8, 8)
    parent(x)  # statistics
    done = fm.morph(parent, fm.InsertBlock("0.0", fill), example_inputs=x)  # like the one behind it, which keeps the width
    assert done.certificate
    assert len(done.model[0]) == 3
    assert done.model[0][1].down is None
    assert not done.model[0][1].bn2.weight.any()
    assert fm.verify(parent, done.model, x, modes=("train",))


def test_convolutions_make_twins_too():
    class Basic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix, self.norm = nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.BatchNorm2d(4)
            self.up, self.bn, self.depthwise = (
                nn.Conv2d(4, 12, 1),
                nn.BatchNorm2d(12),
                nn.Conv2d(12, 12, 3, padding=1, groups=12),
            )
            self.down = nn.Conv2d(12, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(torch.relu(self.depthwise(self.bn(self.up(self.norm(self.mix(x))))))).add_(x)

    torch.manual_seed(0)
    parent = nn.Sequential(nn.Conv2d(3, 4, 1), Basic(), Basic(), nn.Conv2d(4, 2, 1)).double()
    x = inputs(2, 3, 6, 6)
    parent(x)
    child = fm.insert_block(parent, "1", example_inputs=x)
    assert (child[2].down.weight != 0).all()
    assert torch.equal(child[2].depthwise.weight[:6], child[2].depthwise.weight[6:])


class Unit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.BatchNorm2d(4), nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


@pytest.mark.parametrize(
    ("names", "after", "then"),
    [
        (["stem", "unit1", "unit2", "unit3"], "unit1", ["stem", "unit1", "unit2", "unit3", "unit4"]),
        (["stem", "unit01", "unit02", "unit03"], "unit03", ["stem", "unit01", "unit02", "unit03", "unit04"]),
        (["stem", "unit1", "pool", "unit2"], "unit1", ["stem", "unit1", "unit1_2", "pool", "unit2"]),
        (["stem", "deep", "deep_2", "wide"], "deep", ["stem", "deep", "deep_3", "deep_2", "wide"]),
    ],
)
def test_blocks_with_names(names, after, then):
    torch.manual_seed(0)
    units = [nn.Conv2d(3, 4, 1), *(nn.AvgPool2d(3, 1, 1) if name == "pool" else Unit() for name in names[1:])]
    parent = nn.Sequential(OrderedDict(zip(names, units, strict=True)))
    parent.add_module("last", nn.Conv2d(4, 2, 1))
    parent, x = parent.double(), inputs(2, 3, 6, 6)
    parent(x)
    parent.eval()
    done = fm.morph(parent, fm.InsertBlock(after), example_inputs=x, generator=0)
    assert done.certificate
    assert [*done.model._modules] == [*then, "last"]
    at = names.index(after) + 1
    old, new = (list(model.children()) for model in (parent, done.model))
    assert (new[at].down.weight != 0).all()
    for one, two in zip(old, new[:at] + new[at + 1 :], strict=True):
        assert all(torch.equal(value, two.state_dict()[key]) for key, value in one.state_dict().items())
    bare = fm.restructure(parent, done.history, example_inputs=x)
    bare.load_state_dict(done.model.state_dict())
    assert torch.equal(bare.eval()(x), done.model(x))
    with pytest.raises(fm.MorphError, match="no block can be inserted behind 'last'"):
        fm.insert_block(parent, "last", example_inputs=x)


# --- refusals -----------------------------------------------------------------------------------------------------------------


def refused(model: nn.Module, after: str, match: str, x: Tensor | None = None, fill: str = "pair") -> None:
    with pytest.raises(fm.MorphError, match=match) as found:
        fm.insert_block(model, after, fill=fill, example_inputs=inputs() if x is None else x, verify=False)
    assert repr(after).strip("'").split(".")[0] in str(found.value)
    assert "; " in str(found.value)


def test_post_norm_is_refused_with_its_reason():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False).eval()
    refused(model, "layers.0", r"post-norm.*LN\(LN\(x\)\) is not LN\(x\)", torch.randn(2, 5, 8))


def test_pre_norm_of_torch_is_exact():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double().eval()
    done = fm.morph(model, fm.InsertBlock("layers.1"), example_inputs=inputs(2, 5, 8))
    assert done.certificate
    assert len(done.model.layers) == 3
    assert done.model.num_layers == 3
    assert (done.model.layers[2].self_attn.out_proj.weight != 0).all()


def test_what_is_no_block_of_a_stream_is_refused():
    plain = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    refused(plain, "0", "no residual block", inputs().float())
    refused(tower(), "head", "stands in a Tower")
    with pytest.raises(fm.MorphError, match=r"no block 'blocks.9'"):
        fm.insert_block(tower(), "blocks.9", example_inputs=inputs())
    with pytest.raises(fm.MorphError, match="fill='dense' must be one of"):
        fm.insert_block(tower(), "blocks.0", fill="dense", example_inputs=inputs())


def test_shared_blocks_and_tied_weights_are_refused():
    shared = tower()
    shared.blocks[2] = shared.blocks[1]
    refused(shared, "blocks.1", "shared: it stands in several places")
    tied = tower()
    tied.blocks[1].up.weight = tied.blocks[0].up.weight
    refused(tied, "blocks.0", r"shares a weight with 'blocks.1.up.weight'")


def test_code_that_picks_layers_by_number_is_refused():
    class Picks(Tower):
        def forward(self, x: Tensor) -> Tensor:
            seen = []
            for block in self.blocks:
                x = block(x)
                seen.append(x)
            return self.head(x + seen[1])

    class Fixed(Tower):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.blocks[2](self.blocks[1](self.blocks[0](x))))

    torch.manual_seed(0)
    blocks = [Block() for _ in range(3)]
    refused(Picks(blocks).double(), "blocks.0", "computes .* of other things")
    refused(Fixed(blocks).double(), "blocks.0", "other things|calls the new block 0 times")
    refused(Fixed(blocks).double(), "blocks.2", "calls the new block 0 times")


def test_a_rectifier_behind_the_sum_needs_one_in_front():
    class Ends(Block):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(super().forward(x))

    torch.manual_seed(0)
    larger = Block()
    larger.spare = nn.Linear(2, 2)
    model = Tower([larger, Ends()]).double()  # the one with fewer parameters would be copied, and rectify what was not
    child = fm.insert_block(model, "blocks.0", example_inputs=inputs())
    assert type(child.blocks[1]) is Block
    child = fm.insert_block(model, "blocks.1", example_inputs=inputs())  # relu(relu(x)) is relu(x)
    assert [type(block) for block in child.blocks] == [Block, Ends, Ends]


# --- plans --------------------------------------------------------------------------------------------------------------------


def test_plans_histories_and_architectures():
    parent, x = tower(), inputs()
    optimizer = torch.optim.AdamW(parent.parameters(), 1e-3)
    parent(x).sum().backward()
    optimizer.step()
    plan = fm.Plan.from_toml(fm.Plan([fm.InsertBlock("blocks.*"), fm.InsertBlock("blocks.5", "zero")], seed=3).to_toml())
    done = fm.morph(parent, plan, example_inputs=x, optimizer=optimizer)
    assert done.certificate
    assert len(done.model.blocks) == 7
    assert [operator.after for operator in done.history] == ["blocks.2", "blocks.1", "blocks.0", "blocks.5"]
    assert torch.equal(done.model.blocks[0].up.weight, parent.blocks[0].up.weight)
    assert torch.equal(done.model.blocks[4].up.weight, parent.blocks[2].up.weight)
    again = fm.morph(parent, fm.Plan.from_toml(done.history.to_toml())).model
    assert all(torch.equal(one, two) for one, two in zip(done.model.parameters(), again.parameters(), strict=True))
    bare = fm.restructure(parent, done.history)
    bare.load_state_dict(done.model.state_dict())
    assert torch.equal(bare(x), done.model(x))
    (group,) = done.optimizer.param_groups
    assert len(group["params"]) == len(list(done.model.parameters()))
    assert done.optimizer.state[done.model.blocks[4].up.weight]["exp_avg"].any()
    assert done.model.blocks[1].up.weight not in done.optimizer.state


def test_a_consumed_parent():
    parent, x = tower(), inputs()
    wanted = parent(x)
    done = fm.morph(parent, fm.InsertBlock("blocks.0"), example_inputs=x, consume=True)
    assert done.model is parent
    assert done.certificate
    assert torch.allclose(parent(x), wanted, rtol=0, atol=1e-12)


# --- transformers -------------------------------------------------------------------------------------------------------------

_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
_SIZES = {"hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2, **_HEADS}
_T5 = {
    "d_model": 16,
    "d_kv": 4,
    "d_ff": 12,
    "num_layers": 2,
    "num_decoder_layers": 1,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
_IDS = {"vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


@pytest.mark.parametrize(
    ("kind", "config", "after", "places"),
    [
        ("Llama", _SIZES | _IDS, "model.layers.0", "self_attn.layer_idx"),
        ("Gemma3", _SIZES | _IDS | {"head_dim": 4, "sliding_window": 4}, "model.layers.1", "self_attn.layer_idx"),
        ("GPT2", {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_inner": 12, **_IDS}, "transformer.h.0", "attn.layer_idx"),
        ("T5", _T5 | _IDS | {"decoder_start_token_id": 0}, "decoder.block.0", "layer.0.SelfAttention.layer_idx"),
    ],
)
def test_transformers_with_their_caches(kind, config, after, places):
    transformers = pytest.importorskip("transformers")
    declare()
    names = {"GPT2": "GPT2LMHeadModel", "T5": "T5ForConditionalGeneration"}
    made = getattr(transformers, {"Gemma3": "Gemma3TextConfig"}.get(kind, f"{kind}Config"))(**config)
    torch.manual_seed(0)
    parent = getattr(transformers, names.get(kind, f"{kind}ForCausalLM"))(made).eval()
    with torch.no_grad():
        for parameter in parent.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    ids = torch.randint(3, 40, (2, 6))
    call = {"input_ids": ids, **({"decoder_input_ids": ids[:, :4]} if kind == "T5" else {})}
    done = fm.morph(parent, fm.InsertBlock(after), example_inputs=call)
    assert done.certificate
    assert "one entry a layer" in str(done.certificate)
    assert any("past_key_values" in row.output for row in done.certificate.rows)
    blocks = done.model.get_submodule(after.rpartition(".")[0])
    assert [operator_at(block, places) for block in blocks] == list(range(len(blocks)))
    counted = "num_decoder_layers" if kind == "T5" else "num_hidden_layers"
    assert getattr(done.model.config, counted) == len(blocks)
    assert len(getattr(done.model.config, "layer_types", None) or blocks) == len(blocks)
    made = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(done.model.generate(ids, **made), parent.generate(ids, **made))
    assert fm.verify(parent, done.model, kwargs=call, readings=done.readings)


def operator_at(block: nn.Module, path: str) -> object:
    module, _, key = path.rpartition(".")
    return getattr(block.get_submodule(module), key)


def declare() -> None:
    """Let transformers import beside a torchvision whose operators are not built for this machine."""
    from bench.zoo.models import declare_torchvision_operators

    declare_torchvision_operators()
