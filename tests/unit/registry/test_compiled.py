"""What is made of the registry for one device: shared where nothing differs, new where something does."""

from typing import Any

import pytest
from quality_support import live

from preservarium.clock import ManualClock
from preservarium.registry.compiled import CompiledDevices, fields_of


class World:
    rev = 1

    def __init__(self) -> None:
        self.devices: dict[str, Any] = {}
        self.made: list[Any] = []

    def known(self, partition: int, device_id: str) -> Any:
        return self.devices.get(device_id)

    def make(self, device: Any) -> str:
        self.made.append(device)
        return f"{device['type'] if device else 'unknown'} #{len(self.made)}"


def cache(world: World, **settings: Any) -> tuple[CompiledDevices[str], ManualClock]:
    clock = ManualClock()
    made: CompiledDevices[str] = CompiledDevices(
        "test",
        world.make,
        fields_of("rules"),
        world.known,
        world,
        live(normalize=settings),
        clock,  # type: ignore[arg-type]
    )
    return made, clock


def device(number: int, **fields: Any) -> Any:
    return {"device_id": f"d{number}", "rev": 1, "type": "t", "name": f"n{number}", "enabled": True, **fields}


def test_devices_that_say_nothing_of_their_own_cost_one_compilation_together() -> None:
    world = World()
    world.devices = {f"d{n}": device(n) for n in range(1_000)}
    compiled, _ = cache(world)
    assert {compiled.get(0, f"d{n}") for n in range(1_000)} == {"t #1"}
    assert len(world.made) == 1


def test_what_counts_is_never_shared_with_devices_that_say_otherwise() -> None:
    world = World()
    world.devices = {
        "a": device(1), "b": device(2, rules={"hot": None}), "c": device(3, rules={"hot": None}), "d": device(4, type="u"),
        "e": device(5, rules={}), "f": device(6, rules={"hot": {"threshold": 1}}),
    }  # fmt: skip
    compiled, _ = cache(world)
    found = {name: compiled.get(0, name) for name in world.devices}
    assert found["b"] == found["c"]
    assert len({found[name] for name in "abdf"}) == 4


def test_a_change_of_the_catalogue_or_the_device_is_seen_at_once() -> None:
    world = World()
    world.devices = {"d1": device(1), "d2": device(2)}
    compiled, clock = cache(world, config_cache_ttl_s=60)
    before = compiled.get(0, "d1")
    world.rev += 1
    after = compiled.get(0, "d1")
    assert after != before
    assert compiled.get(0, "d2") == after
    world.devices["d1"] = device(1, rules={"hot": None})
    assert compiled.get(0, "d1") == after
    compiled.forget("d1")
    changed = compiled.get(0, "d1")
    assert changed != after
    world.devices["d1"] = device(1)
    clock.advance(59)
    assert compiled.get(0, "d1") == changed
    clock.advance(2)
    assert compiled.get(0, "d1") == after


def test_an_unknown_device_is_looked_up_each_time_and_compiled_once() -> None:
    world = World()
    compiled, _ = cache(world)
    assert compiled.get(0, "d1") == compiled.get(0, "d2")
    assert world.made == [None]
    world.devices["d1"] = device(1)
    assert compiled.get(0, "d1") != compiled.get(0, "d2")


@pytest.mark.parametrize("devices_max", [100])
def test_no_more_devices_are_kept_than_the_settings_say(devices_max: int) -> None:
    world = World()
    world.devices = {f"d{n}": device(n) for n in range(250)}
    compiled, _ = cache(world, config_cache_devices_max=devices_max)
    for n in range(250):
        compiled.get(0, f"d{n}")
    assert len(compiled._cache) == devices_max
    assert compiled.get(0, "d249") == compiled.get(0, "d0")
