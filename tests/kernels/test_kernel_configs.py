"""Tables of kernel configurations: whose entry is taken, and which tiles a product gets."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from fastmorph_kernels import configs
from fastmorph_kernels.configs import lookup, shipped, table_paths
from fastmorph_kernels.tiling import TileConfig, choose

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card that is called Test card and has 100 multiprocessors, and a table that knows it."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Test card")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=100))
    settings = {"block_k": 16, "num_warps": 4, "num_stages": 2, "pack": 0}
    sizes = {"small": 16, "medium": 64, "large": 128, "medium_tensor": 32, "large_tensor": 256}
    default = {name: {"block_m": size, "block_n": size, **settings} for name, size in sizes.items()}
    own = {"medium": {"block_m": 64, "block_n": 32, **settings}}
    table = {"default": {"float32": default}, "Test card": {"float32": own}}
    monkeypatch.setattr(configs, "_table", lambda _: table)
    monkeypatch.setattr(configs, "_entry", configs._entry.__wrapped__)  # past its cache


@pytest.mark.usefixtures("card")
def test_a_device_s_own_entry_comes_before_the_default():
    assert lookup("any", torch.float32, "medium", CUDA)["block_n"] == 32
    assert lookup("any", torch.float32, "large", CUDA)["block_n"] == 128
    assert lookup("any", torch.float32, "medium", CPU)["block_n"] == 64
    assert [(e.device, e.variant) for e in shipped("any")].count(("Test card", "medium")) == 1
    with pytest.raises(KeyError):
        lookup("any", torch.float32, "huge", CUDA)


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize(
    ("rows", "columns", "offsets", "block"),
    [(1024, 1024, 4, 128), (1024, 1024, 3, 64), (128, 128, 200, 128), (64, 128, 200, 64), (32, 1024, 200, 16)],
)
def test_tiles_are_large_where_none_is_half_empty_and_there_are_enough(rows, columns, offsets, block):
    assert choose("any", torch.float32, "ieee", CUDA, rows, columns, offsets).block_m == block


@pytest.mark.usefixtures("card")
def test_tensor_cores_have_their_own_tiles():
    assert choose("any", torch.float32, "tf32x3", CUDA, 4096, 4096, 1).block_m == 256
    assert choose("any", torch.float32, "tf32", CUDA, 64, 64, 1).block_m == 32


@pytest.mark.parametrize(("columns", "blocks"), [(1, (1, 32)), (3, (4, 8)), (16, (16, 2)), (17, (32, 1)), (500, (32, 1))])
def test_a_tile_holds_several_offsets_of_few_channels(columns, blocks):
    assert TileConfig(16, 32, 16, 4, 2, 0).blocks(columns) == blocks


@pytest.mark.parametrize("kernel", table_paths())
def test_block_sizes_are_powers_of_two(kernel):
    entries = list(shipped(kernel))
    assert entries
    for entry in entries:
        blocks = [value for name, value in entry.config.items() if name.startswith(("block_", "num_warps"))]
        assert all(value & (value - 1) == 0 and value > 0 for value in blocks), entry
