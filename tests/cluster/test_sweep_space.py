"""Spaces: what they allow, draw and refuse."""

import itertools
from importlib.resources import files

import pytest
from ray.tune.search.optuna import OptunaSearch

from cluster.config import TrainConfig
from cluster.sweep_space import Space, parse_space, with_values

CONDITIONAL = """
contrast.bank_length: {choice: [50, 100], when: {method: [bankcl]}}
method: {choice: [protocl, bankcl]}
"""


def test_the_default_space_draws_valid_configurations_and_uses_every_key():
    text = files("jobs").joinpath("spaces", "contrast.yaml").read_text()
    base = with_values(TrainConfig(), {"model.projection_mode": "per_layer"})
    space = parse_space(text, base)
    points = space.sample(50, seed=1, base=base)
    assert len(points) == 50
    assert {key for point in points for key in point} == {key.name for key in space.keys}
    for point in points:
        assert 0.05 <= with_values(base, point).contrast.temperature <= 300


def test_a_conditional_key_exists_only_beside_its_value():
    base = TrainConfig()
    space = parse_space(CONDITIONAL, base)
    assert space.grid(base) == [
        {"method": "protocl"},
        {"method": "bankcl", "contrast.bank_length": 50},
        {"method": "bankcl", "contrast.bank_length": 100},
    ]


def test_a_key_may_depend_on_one_that_depends_on_a_third_whatever_their_order():
    lines = [
        "contrast.weight: {choice: [0.5], when: {contrast.bank_length: [50]}}",
        *CONDITIONAL.strip().splitlines(),
    ]
    base = TrainConfig()
    spaces = (parse_space("\n".join(order), base) for order in itertools.permutations(lines))
    deepest = {"method": "bankcl", "contrast.bank_length": 50, "contrast.weight": 0.5}
    assert all(deepest in space.grid(base) for space in spaces)


def test_the_same_seed_draws_the_same_points():
    space = parse_space("contrast.temperature: {loguniform: [0.05, 300]}", TrainConfig())
    first, second, other = (space.sample(5, seed, TrainConfig()) for seed in (1, 1, 2))
    assert first == second != other


def test_optuna_takes_up_the_points_of_the_default_space_that_were_drawn_before():
    base = TrainConfig()  # without the projections that stage_weights are for
    text = files("jobs").joinpath("spaces", "contrast.yaml").read_text()
    space = parse_space(text, base)
    drawn = [{}, *space.sample(4, seed=1, base=base)]
    search = OptunaSearch(points_to_evaluate=[space.whole(point, base) for point in drawn])
    search.set_search_properties("student_miou", "max", space.domains())
    assert [space.cut(search.suggest(str(i)), base) for i in range(5)] == drawn


def test_a_point_that_a_space_cannot_draw_has_no_whole():
    space = parse_space("contrast.weight: {choice: [0.5, 2.0]}", TrainConfig())
    assert space.whole({}, TrainConfig()) is None  # the own weight is 1
    assert space.whole({"contrast.weight": 2.0}, TrainConfig()) == {"contrast.weight": 2.0}


def test_no_more_points_are_drawn_than_are_asked_for_where_all_differ(monkeypatch):
    cut, drawn = Space.cut, []
    monkeypatch.setattr(Space, "cut", lambda *of: drawn.append(of[1]) or cut(*of))
    space = parse_space("contrast.temperature: {loguniform: [0.05, 300]}", TrainConfig())
    assert space.sample(5, 1, TrainConfig()) == drawn


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "contrast.temprature: {uniform: [1, 2]}",
            ["temprature", "did you mean contrast"],
        ),
        ("contrast.temperature: {uniform: [0, 1]}", ["contrast.temperature can be 0", "above 0"]),
        ("contrast.temperature: {unifrm: [1, 2]}", ["unifrm", "loguniform"]),
        ("contrast.temperature: {uniform: [1]}", ["contrast.temperature", "uniform", "missing"]),
        ("contrast.temperature: 3", ["contrast.temperature", "no distribution"]),
        ("method: {choice: [distcl, dist]}", ["method can be 'dist'", "distcl"]),
        ("contrast.bank_length: {uniform: [1.0, 9.0]}", ["bank_length is 1.0", "int"]),
        ("contrast.stage_weights: {choice: [[1, 2]]}", ["stage_weights", "per_layer"]),
        ("workers: {choice: [2]}", ["workers is one for all trials", "--workers"]),
        ("seed: {choice: [1, 2]}", ["seed is one for all trials", "--search.seeds"]),
        ("contrast.start: {choice: [10]}", ["contrast.start is one for all trials"]),
        ("optimization.iterations: {choice: [10]}", ["optimization.iterations is one for all"]),
        ("validation.data: {choice: [a]}", ["validation.data is one for all trials"]),
        ("3: {choice: [1]}", ["no key '3'"]),
        ("contrast.weight: {choice: [1.0], when: {method: []}}", ["contrast.weight", "when is"]),
        ("contrast.weight: {choice: [1.0], when: [method]}", ["contrast.weight", "when is"]),
        ("contrast.weight: {choice: [1.0], when: null}", ["contrast.weight", "when is None"]),
        ("contrast.weight: {choice: [1.0], when: {3: [1]}}", ["no key '3'"]),
        (
            "contrast.weight: {choice: [1.0], when: {method: [bankcl, bnkcl]}}",
            ["contrast.weight", "method is 'bnkcl'"],
        ),
        ("optimization.lr: {loguniform: [1e-5, 0.1]}", ["optimization.lr", "'1e-5'", "1.0e-5"]),
        ("{method: {choice: [bankcl], when: {method: [bankcl]}}}", ["method", "itself"]),
        ("contrast.temperature: {uniform: [", ["not YAML"]),
        ("{}", ["give keys of the configuration"]),
    ],
)
def test_a_wrong_space_is_one_line_that_names_the_key(text, words):
    with pytest.raises(ValueError) as error:
        parse_space(text, TrainConfig())
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_a_grid_needs_choices():
    space = parse_space("contrast.temperature: {uniform: [1, 2]}", TrainConfig())
    with pytest.raises(ValueError, match=r"contrast\.temperature is uniform: a grid needs choice"):
        space.grid(TrainConfig())
