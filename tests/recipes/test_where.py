"""Layers, parts and modules: what they select, and what does not exist."""

from __future__ import annotations

import pytest
from torch import nn

from trainless.errors import InputError
from trainless.recipes import Where, layer_numbers, resolve
from trainless.seams import Site


def sites(part: str, count: int, prefix: str, role: str = "self") -> list[Site]:
    return [
        Site(
            f"{prefix}.{i}.attn",
            nn.Identity(),
            "h",
            role=role,
            parts=frozenset({part}),
            layer=i,
            layers=count,
        )
        for i in range(count)
    ]


TEXT, VISION = sites("text", 6, "model.layers"), sites("vision", 4, "vision.blocks")


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("2:-1", [2, 3, 4]),
        ("::2", [0, 2, 4]),
        (":", [0, 1, 2, 3, 4, 5]),
        (" 4 : ", [4, 5]),
        ("::-1", [0, 1, 2, 3, 4, 5]),
        ("2:100", [2, 3, 4, 5]),
        ("6:", []),
        (0, [0]),
        (-1, [5]),
        ([5, 0, -1], [0, 5]),
        ((1, 2), [1, 2]),
    ],
)
def test_layer_numbers(spec, expected):
    assert layer_numbers(spec, 6) == expected


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (6, "there are 6 layers, 0 to 5"),
        (-7, "layer -7 does not exist"),
        ([0, 9, 10], "layer 9, 10 does not exist"),
        ("3", "for one layer write 3"),
        ("a:b", "not a Python slice"),
        ("::0", "step"),
        ("", "not a Python slice"),
        (True, "list of ints"),
        ([1.0], "list of ints"),
    ],
)
def test_bad_layers(spec, said):
    with pytest.raises(InputError, match="layers=") as error:
        layer_numbers(spec, 6)
    assert said in str(error.value)


def test_slices_are_counted_within_each_part():
    chosen = Where(layers="-1:").select(TEXT + VISION)
    assert [s.name for s in chosen] == ["model.layers.5.attn", "vision.blocks.3.attn"]
    assert Where(layers=[5], part="text").select(TEXT + VISION) == [TEXT[5]]
    with pytest.raises(InputError, match=r"4 layers.*part vision, self"):
        Where(layers=5).select(TEXT + VISION)
    cross = sites("text", 2, "model.cross", role="cross")
    assert Where(layers=-1).select(TEXT + cross) == [TEXT[5], cross[1]]


def test_part_and_modules():
    assert Where().select(TEXT + VISION) == TEXT + VISION
    assert Where(part="vision").select(TEXT + VISION) == VISION
    assert Where(part="denoiser").select(TEXT + VISION) == []
    assert Where(modules="*.1.*").select(TEXT + VISION) == [TEXT[1], VISION[1]]
    assert Where(modules=["model.layers.0.*", "vision.*"], layers=0).select(TEXT + VISION) == [
        TEXT[0],
        VISION[0],
    ]
    assert Where(modules=["nothing*"]).select(TEXT) == []
    with pytest.raises(InputError, match="'typo"):
        Where(modules=["model.*", "typo*"]).select(TEXT)


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ({"part": "txt"}, "did you mean 'text'"),
        ({"layer": 1}, "unknown key; did you mean 'layers'"),
        ({"layers": "1-2"}, "not a Python slice"),
        ({"layers": 1.0}, "must be a string, an int, a list of ints or null; got 1.0"),
        ({"layers": []}, "at least one layer"),
        ({"modules": []}, "at least one glob"),
        ({"modules": [""]}, "empty glob"),
        ({"modules": [1]}, "must be a string; got 1"),
    ],
)
def test_bad_where_is_refused_on_loading(where, said):
    with pytest.raises(InputError) as error:
        resolve({"use": "toy_shrink", "where": where})
    assert said in str(error.value)
    assert "toy_shrink.where" in str(error.value)
