"""Experts that take turns on the device."""

import pytest
import torch
from torch import nn
from wan_pack.distributed.rank.expert import take_turn
from wan_pack.distributed.weights.offload import HostParking


def layers(seed: int, width: int = 8) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(8, width), nn.LayerNorm(width), nn.Linear(width, 4))


def copies(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def host_of(parking: HostParking) -> int | None:
    return None if parking._host is None else parking._host.data_ptr()


def test_experts_trade_places_in_one_piece_of_host_memory():
    """A second copy of a 14B expert is 28 GB that the plan does not count, and 13 seconds of locking pages."""
    models = {"high": layers(0), "low": layers(1)}
    whole = {name: copies(model) for name, model in models.items()}
    weights = {name: HostParking(model) for name, model in models.items()}
    resident = weights["high"].resident_bytes
    weights["low"].park()
    place = host_of(weights["low"])
    for turn in ("low", "high", "high", "low"):
        other = {"high": "low", "low": "high"}[turn]
        take_turn(weights, turn)
        assert all(torch.equal(now, before) for now, before in zip(models[turn].parameters(), whole[turn], strict=True))
        assert weights[turn].resident_bytes == resident
        assert weights[other].resident_bytes == 0
        assert not weights[turn].has_copy
        assert host_of(weights[other]) == place


@pytest.mark.parametrize("why", ["sizes", "keep", "kept", "both there", "both parked", "leaving has a copy"])
def test_what_cannot_trade_takes_turns_all_the_same(why):
    models = {"high": layers(0), "low": layers(1, 16 if why == "sizes" else 8)}
    whole = {name: copies(model) for name, model in models.items()}
    weights = {
        "high": HostParking(models["high"], keep=why in ("keep", "leaving has a copy")),
        "low": HostParking(models["low"], keep=why == "kept"),
    }
    if why == "leaving has a copy":
        weights["high"].park()
        weights["high"].fetch()
    for name in {"both there": [], "both parked": ["high", "low"]}.get(why, ["low"]):
        weights[name].park()
    assert not weights["low"].trade(weights["high"])
    for turn in ("low", "high"):
        take_turn(weights, turn)
        assert all(torch.equal(now, before) for now, before in zip(models[turn].parameters(), whole[turn], strict=True))


def test_what_is_left_alone_stays_wherever_it_stands():
    """Before others and behind them, and what it shares with them is left alone, too."""
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    model[3].weight = model[0].weight
    values = [parameter.clone() for parameter in model.parameters()]
    parking = HostParking(model, without=(model[0], model[2]))
    parking.park()
    sizes = [parameter.untyped_storage().nbytes() for parameter in (*model[0].parameters(), *model[2].parameters())]
    assert sizes == [64, 16, 64, 16] and parking.resident_bytes == 0
    assert [model[n].bias.untyped_storage().nbytes() for n in (1, 3)] == [0, 0]
    assert model[1].weight.untyped_storage().nbytes() == 0
    parking.fetch()
    assert parking.resident_bytes == 64 + 16 + 16
    assert all(torch.equal(now, before) for now, before in zip(model.parameters(), values, strict=True))


def test_where_there_is_nothing_to_park_nothing_is_done():
    parking = HostParking(nn.Identity())
    parking.park()
    parking.fetch()
    assert parking.resident_bytes == 0


def test_what_is_parked_or_there_already_stays_so():
    """And what is dropped is gone from both places; of what is on the device no host memory can be handed on."""
    model = layers(0)
    values, parking = copies(model), HostParking(model, keep=True)
    parking.fetch()
    assert not parking.has_copy and parking.hand_over() == []
    for _ in range(2):
        parking.park()
        assert parking.resident_bytes == 0 and parking.has_copy
    with parking.writable():
        assert parking.resident_bytes == sum(value.nbytes for value in values)
        assert all(torch.equal(now, before) for now, before in zip(model.parameters(), values, strict=True))
    parking.drop()
    assert parking.resident_bytes == 0 and not parking.has_copy
