"""New ids: rows of an embedding, logits of a head, and the old logits as they were."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fastmorph as fm


class Language(nn.Module):
    def __init__(self, tied: bool, ids: int = 11, width: int = 11) -> None:  # as wide as there are ids, which is no reason
        super().__init__()
        self.ids, self.inner = nn.Embedding(ids, width, padding_idx=0), nn.Linear(width, ids)
        self.back, self.head = nn.Linear(ids, width), nn.Linear(width, ids, bias=not tied)
        self.shift = nn.Parameter(torch.randn(ids))
        if tied:
            self.head.weight = self.ids.weight

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.back(torch.tanh(self.inner(self.ids(ids))))
        return 30 * torch.tanh((self.head(hidden) + self.shift) / 30)


@pytest.mark.parametrize("tied", [True, False])
def test_old_logits_stay(tied):
    torch.manual_seed(0)
    parent, ids = Language(tied).double().eval(), torch.randint(11, (2, 5))
    optimizer = torch.optim.Adam(parent.parameters())
    parent(ids).sum().backward()
    optimizer.step()
    done = fm.morph(parent, fm.GrowVocabulary("ids", 16), example_inputs=ids, optimizer=optimizer)
    child = done.model
    assert "the first 11 of 16 ids" in str(done.certificate)
    assert child(torch.tensor([[15]])).shape == (1, 1, 16)
    assert torch.equal(child.ids.weight[:11], parent.ids.weight)
    assert (child.ids.weight[11:] != 0).all()
    assert (child.ids.num_embeddings, child.head.out_features, child.inner.out_features) == (16, 16, 11)
    assert (child.head.weight is child.ids.weight) == tied
    assert done.optimizer.state[child.head.weight]["exp_avg"].shape == (16, 11)
    assert not done.optimizer.state[child.head.weight]["exp_avg"][11:].any()
    again = fm.morph(parent, fm.Plan.from_toml(done.history.to_toml()), verify=False).model
    assert all(torch.equal(one, two) for one, two in zip(child.parameters(), again.parameters(), strict=True))
    fm.restructure(parent, done.history).load_state_dict(child.state_dict())


def test_two_growths_in_a_row():
    parent, ids = Language(True).double().eval(), torch.randint(11, (2, 5))
    done = fm.morph(parent, [fm.GrowVocabulary("ids", 13), fm.GrowVocabulary("ids", 20)], example_inputs=ids)
    assert done.certificate
    assert done.model(ids).shape[-1] == 20


def test_refusals():
    parent, ids = Language(False), torch.randint(11, (2, 5))
    for layer, size, match in [
        ("inner", 20, "no nn.Embedding"),
        ("ids", 11, "no int above the 11 ids"),
        ("ids", True, "no int"),
    ]:
        with pytest.raises(fm.MorphError, match=match):
            fm.grow_vocabulary(parent, layer, size, example_inputs=ids)

    class Reads(Language):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids) + self.ids.weight.sum()

    with pytest.raises(fm.MorphError, match="takes its weight by sum"):
        fm.grow_vocabulary(Reads(False), "ids", 20, example_inputs=ids)
