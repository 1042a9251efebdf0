"""Losses and gradients by hand, a layer at a time."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map, tree_unflatten

from mlx_gptoss.checkpoint.adapter import Adapter
from mlx_gptoss.checkpoint.hub import DEMO_FOLDER
from mlx_gptoss.checkpoint.reader import Checkpoint
from mlx_gptoss.model.batch import Batch, Segment
from mlx_gptoss.model.low_rank import PARTS
from mlx_gptoss.tokenizer import Tokenizer
from mlx_gptoss.tune import gradient as module
from mlx_gptoss.tune.base import TRAINED, Base, Tree, flat, pairs_of, parts_of
from mlx_gptoss.tune.examples import Example, Kept, Preference, examples_of
from mlx_gptoss.tune.gradient import Task, gradient, measure, task_of
from tests.support.checkpoints import write_checkpoint
from tests.support.random_weights import Shape
from tests.support.tuning import style_rows

SCALE = 2.0


def norm_of(arrays: Iterable[mx.array]) -> float:
    return float(np.sqrt(sum(np.square(np.array(a)).sum() for a in arrays)))


def dict_of(tree: Tree) -> dict[str, mx.array]:
    return dict(flat(tree))


def noisy(tree: Tree, seed: int) -> Tree:
    """With b away from zero, where the gradient of a is zero."""
    key = mx.random.key(seed)

    def moved(value: mx.array) -> mx.array:
        nonlocal key
        key, own = mx.random.split(key)
        return value + 0.02 * mx.random.normal(value.shape, key=own)

    tree = tree_map(moved, tree)
    mx.eval(tree)
    return tree


def drawn(vocab: int, lengths: tuple[int, ...], seed: int) -> list[Example]:
    rng = np.random.default_rng(seed)
    made = []
    for length in lengths:
        ids = rng.integers(0, vocab, length).astype(np.int32)
        rows = np.sort(rng.permutation(length - 1)[: max(1, length // 2)]).astype(np.int32)
        made.append(Example(ids, rows, ids[rows + 1]))
    return made


@pytest.fixture(scope="module", params=["random 0", "random 1", "demo"])
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[Example]]:
    if request.param == "demo":
        tokenizer = Tokenizer.from_folder(DEMO_FOLDER)
        rows = style_rows("gradient", 3)
        return DEMO_FOLDER, [e for row in rows for e in examples_of(row, tokenizer, "")]
    seed = int(request.param[-1])
    shape = Shape(vocab=96, layers=3)
    folder = write_checkpoint(tmp_path_factory.mktemp("gradient"), shape, seed=seed)
    return folder, drawn(96, (40, 2, 25), seed)


def whole(base: Base, tree: Tree, examples: list[Example]) -> tuple[float, dict[str, mx.array]]:
    """The same by MLX's own differentiation of the whole graph at once."""
    task = task_of(examples, base, 0.1)
    rows = np.concatenate(
        [e.rows + at for e, at in zip(examples, np.cumsum([0, *map(len, examples)]), strict=False)]
    )
    wanted = mx.array(np.concatenate([e.wanted for e in examples]))

    def loss(tree: Tree) -> mx.array:
        batch = Batch(task.segments, base.config.experts_per_token)
        x = base.model.embedding(task.tokens)
        for i in range(base.config.num_layers):
            x = base.adapted(base.layer(i), pairs_of(tree, i), SCALE)(x, batch)
        z = base.model.logits(mx.take(x, mx.array(rows), axis=0))
        assert z is not None
        return (mx.logsumexp(z, axis=-1) - mx.take_along_axis(z, wanted[:, None], axis=-1)[:, 0]).sum()

    value, grads = mx.value_and_grad(loss)(tree)
    mx.eval(value, grads)
    return float(np.array(value)), dict_of(grads)


def test_the_gradient_of_every_part_is_that_of_differences(case: tuple[Path, list[Example]]) -> None:
    folder, examples = case
    base = Base(Checkpoint(folder, "float32"))
    tree = noisy(base.new_parameters(range(base.config.num_layers), PARTS, 4, 0), 3)
    task = task_of(examples, base, 0.1)
    _, grads = gradient(base, tree, SCALE, task)
    found = dict_of(grads)
    for part in PARTS:
        for side in "ab":
            names = [n for n in found if n.endswith(f".{part}.{side}")]
            norm = norm_of(found[n] for n in names)

            def loss(at: float, names: list[str] = names, norm: float = norm) -> float:
                moved = {n: v + at * found[n] / norm if n in names else v for n, v in flat(tree)}
                return measure(base, tree_unflatten(list(moved.items())), SCALE, task).loss

            # A route that flips between the two sides of one distance does not at the other.
            slopes = ((loss(eps) - loss(-eps)) / (2 * eps) / norm for eps in (1e-3, 3e-3))
            assert any(abs(slope - 1) < 0.01 for slope in slopes), (part, side)


def test_a_layer_at_a_time_is_the_whole_at_once_to_the_bit(
    case: tuple[Path, list[Example]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, examples = case
    base = Base(Checkpoint(folder, "float32"))
    tree = noisy(base.new_parameters(range(1, base.config.num_layers), PARTS, 4, 0), 3)
    measured, grads = gradient(base, tree, SCALE, task_of(examples, base, 0.1))
    value, expected = whole(base, tree, examples)
    assert measured.loss == pytest.approx(value, rel=1e-6)
    found = dict_of(grads)
    assert found.keys() == expected.keys()
    assert all(np.array_equal(np.array(found[n]), np.array(expected[n])) for n in found)
    # The head's rows, a few at a time, give the same but for the order of sums.
    monkeypatch.setattr(module, "HEAD_VALUES", 0)
    again, in_parts = gradient(base, tree, SCALE, task_of(examples, base, 0.1))
    assert again.loss == pytest.approx(value, rel=1e-6)
    assert all(np.abs(np.array(v - found[n])).max() < 1e-4 for n, v in flat(in_parts))


def test_layers_read_from_disk_give_the_same_gradient(case: tuple[Path, list[Example]]) -> None:
    folder, examples = case
    resident, streamed = (Base(Checkpoint(folder, "float32"), stream=s) for s in (False, True))
    tree = noisy(resident.new_parameters([1], ("q_proj", "o_proj", "down_proj"), 4, 0), 3)
    (one, a), (two, b) = (gradient(x, tree, SCALE, task_of(examples, x, 0.1)) for x in (resident, streamed))
    assert one == two and not streamed.model.layers
    assert all(np.array_equal(np.array(v), np.array(dict_of(b)[n])) for n, v in flat(a))


def test_the_loss_is_that_of_the_served_model(case: tuple[Path, list[Example]]) -> None:
    folder, examples = case
    base = Base(Checkpoint(folder, "float32"))
    tree = noisy(base.new_parameters(range(base.config.num_layers), PARTS, 4, 0), 3)
    model = base.with_adapter(Adapter(parts_of(tree), SCALE))
    tokens = mx.array(np.concatenate([e.ids for e in examples]))
    logits = model(tokens, [Segment(len(e), model.make_cache(), adapter=TRAINED) for e in examples])
    assert logits is not None
    z, at, expected = np.array(logits).astype(np.float64), 0, 0.0
    for e in examples:
        own = z[at + e.rows]
        own = own - own.max(axis=-1, keepdims=True)
        expected -= (own[np.arange(len(e.rows)), e.wanted] - np.log(np.exp(own).sum(axis=-1))).sum()
        at += len(e)
    found = measure(base, tree, SCALE, task_of(examples, base, 0.1))
    assert found.loss == pytest.approx(expected, rel=1e-5)  # logits in float32
    assert (found.count, found.tokens) == (sum(len(e.rows) for e in examples), len(tokens))


def test_preferences_weigh_the_gain_over_the_base(tmp_path: Path) -> None:
    """DPO's loss from the logits of both models, and its gradient against differences."""
    base = Base(Checkpoint(write_checkpoint(tmp_path, Shape(vocab=96)), "float32"))
    made = drawn(96, (20, 24, 15, 9), 5)
    pairs = [Preference(made[0], made[1]), Preference(made[2], made[3])]
    tree = noisy(base.new_parameters([0, 1], PARTS[:4], 4, 0), 3)
    zero = base.new_parameters([0, 1], PARTS[:4], 4, 0)
    task = task_of(pairs, base, 0.5)
    anchored = task_of(pairs, base, 0.5, 0.3)
    assert measure(base, zero, SCALE, task).mean == pytest.approx(np.log(2), abs=1e-5)

    def sums(tree: Tree) -> np.ndarray:
        return np.array([-measure(base, tree, SCALE, task_of([e], base, 0.5)).loss for e in made]).reshape(
            2, 2
        )

    gains = sums(tree) - sums(zero)
    margins = 0.5 * (gains[:, 0] - gains[:, 1])
    measured, _ = gradient(base, tree, SCALE, task)
    assert measured.loss == pytest.approx(float(np.log1p(np.exp(-margins)).sum()), rel=1e-4)
    assert (measured.count, measured.won) == (2, int((margins > 0).sum()))
    held = sum(0.3 * sums(tree)[i, 0] / len(pair.chosen.rows) for i, pair in enumerate(pairs))
    assert measure(base, tree, SCALE, anchored).loss == pytest.approx(measured.loss - held, rel=1e-4)
    for one in (task, anchored):
        _, grads = gradient(base, tree, SCALE, one)
        norm = norm_of(dict_of(grads).values())

        def loss(at: float, one: Task = one, grads: Tree = grads, norm: float = norm) -> float:
            return measure(base, tree_map(lambda v, g: v + at * g / norm, tree, grads), SCALE, one).loss

        assert abs((loss(1e-3) - loss(-1e-3)) / 2e-3 / norm - 1) < 0.01


def test_what_is_kept_is_held_to_what_the_base_says(tmp_path: Path) -> None:
    """Among examples: the divergence from the logits of both models, and the gradient against differences."""
    base = Base(Checkpoint(write_checkpoint(tmp_path, Shape(vocab=96)), "float32"))
    first, new, second = drawn(96, (20, 24, 15), 5)
    kept = [Kept(e.ids, e.rows, e.wanted) for e in (first, second)]
    tree = noisy(base.new_parameters([0, 1], PARTS[:4], 4, 0), 3)
    zero = base.new_parameters([0, 1], PARTS[:4], 4, 0)
    task = task_of([kept[0], new, kept[1]], base, 0.1)

    def said(tree: Tree, e: Example) -> np.ndarray:
        model = base.with_adapter(Adapter(parts_of(tree), SCALE))
        z = model(mx.array(e.ids), [Segment(len(e), model.make_cache(), adapter=TRAINED)])
        own: np.ndarray = np.array(z)[e.rows].astype(np.float64)
        logs: np.ndarray = own - np.log(np.exp(own).sum(axis=-1, keepdims=True))
        return logs

    expected = sum((np.exp(said(zero, e)) * (said(zero, e) - said(tree, e))).sum() for e in kept)
    measured, grads = gradient(base, tree, SCALE, task)
    assert measured.strayed == pytest.approx(expected, rel=1e-3) and expected > 1e-3
    assert measured.loss == pytest.approx(
        measure(base, tree, SCALE, task_of([new], base, 0.1)).loss, rel=1e-5
    )
    assert (measured.count, measured.kept) == (len(new.rows), len(first.rows) + len(second.rows))
    norm = norm_of(dict_of(grads).values())

    def loss(at: float) -> float:
        found = measure(base, tree_map(lambda v, g: v + at * g / norm, tree, grads), SCALE, task)
        return found.loss + found.strayed

    assert abs((loss(1e-3) - loss(-1e-3)) / 2e-3 / norm - 1) < 0.01
    # Where nothing has changed there is nothing to go back to.
    still, none = gradient(base, zero, SCALE, task_of(kept, base, 0.1))
    assert abs(still.strayed) < 1e-4 and norm_of(dict_of(none).values()) < 1e-4
