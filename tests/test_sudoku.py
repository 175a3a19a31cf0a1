# SPDX-License-Identifier: MIT
"""Grids, puzzles and scores of sudoku.py, and its story at toy size."""
import json
import math
import random

import numpy as np
import pytest
import torch
from conftest import random_dit, seeded

import checkpoint
import sudoku
from data import BadInput
from experiments import orders
from experiments.orders import choose, write
from experiments.sudoku_story import perfect_grids, puzzles_of
from generator import sample
from sudoku import Puzzles, score, solutions, symmetric, units, write_examples
from teacher import Masked

rng = random.Random(0)
GRIDS = np.array(list(solutions([0] * 16, 4, rng)))


def grids_of_9(count):
    rng = random.Random(1)
    return np.array([next(solutions([0] * 81, 9, rng)) for _ in range(count)])


def test_there_are_288_grids_of_4():
    assert len(GRIDS) == len({tuple(grid) for grid in GRIDS}) == 288
    assert score(GRIDS, 4)["valid"] == 1


def test_units():
    """27 of 9 x 9: every cell in three; the last is the bottom right box."""
    assert (np.bincount(units(9).flatten()) == 3).all()
    assert units(9)[-1].tolist() == [60, 61, 62, 69, 70, 71, 78, 79, 80]


def test_a_solver_that_respects_clues():
    grid = grids_of_9(1)[0]
    assert score(grid[None].repeat(2, 0), 9)["valid"] == 1
    puzzle = [digit * (i % 2) for i, digit in enumerate(grid.tolist())]
    solved = np.array(next(solutions(puzzle, 9, random.Random(2))))
    assert (solved[1::2] == grid[1::2]).all() and score(solved[None].repeat(2, 0), 9)["valid"] == 1
    assert next(solutions([1, 1] + [0] * 14, 4, rng), None) is None          # no solution at all


def test_puzzles_have_one_solution():
    grid = grids_of_9(1)[0].tolist()
    puzzles = puzzles_of(grid, 9, random.Random(3))
    for clues, puzzle in puzzles.items():
        assert clues == 81 - puzzle.count(0)
        assert all(digit in (0, right) for digit, right in zip(puzzle, grid))
    assert min(puzzles) < 32
    assert list(solutions(puzzles[min(puzzles)], 9, rng)) == [grid]


@pytest.mark.parametrize("n", [4, 9])
def test_symmetries(n):
    """Valid grids stay valid; those of 4 x 4 fall into two classes, of 96 and 192 grids, and of one
    grid all of its class are reached, about equally often."""
    grids = GRIDS if n == 4 else grids_of_9(5)
    first = torch.from_numpy(grids[:1] - 1).repeat(4000, 1)
    images = symmetric(first, n, seeded(0)).numpy() + 1
    assert score(images, n)["valid"] == 1
    found, counts = np.unique(images, axis=0, return_counts=True)
    if n == 4:
        assert len(found) in (96, 192)
        expected = 4000 / len(found)
        assert ((counts - expected) ** 2 / expected).sum() < 1.4 * len(found)
    else:
        assert len(found) == 4000


def test_score_of_known_laws():
    flat = score(GRIDS.repeat(3, 0), 4)
    assert abs(flat["js"]) < 1e-9 and abs(flat["kl"]) < 1e-9 and flat["seen"] == 1
    assert flat["entropy"] == pytest.approx(1) and flat["rules"] == 1
    one = score(GRIDS[:1].repeat(9, 0), 4)                 # one grid again and again
    p = np.full(288, 1 / 288)
    q = np.eye(288)[0]
    m = (p + q) / 2
    js = (np.log(p / m) @ p + np.log(1 / m[0])) / 2
    assert one["js"] == pytest.approx(js) and one["kl"] == pytest.approx(math.log(288))
    assert one["entropy"] == 0 and one["agreement"] == 1 and one["seen"] == 1 / 288
    none = score(np.ones((8, 16), int), 4)                 # no grid at all
    assert none["rules"] == none["valid"] == none["seen"] == 0
    assert none["js"] == pytest.approx(math.log(2))


def test_rules_by_hand():
    """Two digits of one row change places: the row holds, two columns do not; here they lie in one
    box, which holds."""
    grid = GRIDS[0].copy()
    grid[[0, 1]] = grid[[1, 0]]
    record = score(np.stack([grid, GRIDS[0]]), 4)
    assert record["rules"] == pytest.approx((10 / 12 + 1) / 2) and record["valid"] == 0.5


def test_a_perfect_denoiser_pays_for_its_order_alone():
    """One cell a pass: the flat law. All at once: independent cells, and hardly a grid."""
    grids = perfect_grids(2000, 16, "shuffled", seeded(0))
    assert score(grids, 4)["valid"] == 1 and score(grids, 4)["js"] < 0.03
    assert score(perfect_grids(2000, 1, "even", seeded(0)), 4)["valid"] < 0.01
    js = [score(perfect_grids(2000, 8, order, seeded(0)), 4)["js"]
          for order in ("shuffled", "random")]
    assert js[0] + 0.1 < js[1]


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sudoku")
    write_examples(folder / "examples.tsv", 4, random.Random(1))
    return folder


def test_examples(examples):
    lines = (examples / "examples.tsv").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("\t") for line in lines]
    assert all(a in (".", b) for puzzle, grid in pairs for a, b in zip(puzzle, grid))
    assert {puzzle.count(".") for puzzle, _ in pairs} == set(range(17))
    counts = {}
    for _, grid in pairs:
        counts[grid] = counts.get(grid, 0) + 1
    assert len(counts) == 288 and set(counts.values()) == {25}


def test_batches(examples):
    """Puzzle and answer agree; about half of the puzzles are empty; every grid is right."""
    data = Puzzles(str(examples / "examples.tsv"), "char", 32, cache=examples)
    x_0, free = data.batch("train", 400, seeded(0))
    puzzle, grid = x_0[:, :16] - 1, x_0[:, 16:] - 1
    assert score(grid.numpy(), 4)["valid"] == 1
    assert ((puzzle == grid) | (puzzle == 0)).all()
    assert 150 < (puzzle == 0).all(1).sum() < 260
    assert not free[:, :16].any() and free[:, 16:].all()
    part, _ = data.batch("train", 400, seeded(0), slice(1, None, 2))
    assert torch.equal(part, x_0[1::2])


@pytest.mark.parametrize("flags", [["--puzzle", "12" + "." * 14], ["--empty"]])
def test_story(flags, tmp_path, capsys, monkeypatch):
    """The whole of it, untrained, in a GPU's dtype: table, records and pictures."""
    from experiments import sudoku_story
    monkeypatch.setattr(checkpoint, "pick_dtype", lambda dtype, device: "bfloat16")
    monkeypatch.setattr(sudoku, "NUM_EXAMPLES", {4: 288 * 2})
    monkeypatch.setattr(sudoku_story, "NUM_PUZZLES", 3)
    monkeypatch.setattr(sudoku_story, "STEPS", {4: [2]})
    monkeypatch.setattr(sudoku_story, "ORDERS", ("shuffled", "confident"))
    sudoku.main(["--out", str(tmp_path), "--num_texts", "16", "--updates", "2", "--batch_size", "8",
                 "--micro_batch", "8", "--device", "cpu", *flags])
    printed = capsys.readouterr().out
    assert "idlm independent" in printed
    assert ("12.............." in printed) == ("--puzzle" in flags)
    assert ("clues changed" in printed) == ("--puzzle" in flags)
    records = json.loads((tmp_path / "sudoku.json").read_text(encoding="utf-8"))
    assert records[0]["model"] == "real grids" and records[0]["valid"] == 1
    assert len(records) == 1 + 3 + 3 * 2 and records[-1]["size"] == 4
    assert ("solved_8" in records[-1]) == ("--puzzle" in flags)
    assert records[-1]["empty"] == ("--empty" in flags)
    for picture in "rules.png", "filling.png":
        assert (tmp_path / picture).stat().st_size > 5000


@pytest.mark.parametrize("process, models", [
    ("mdlm", ["teacher", "idlm", "idlm slow"]), ("duo", ["teacher", "dcd", "idlm"])])
def test_story_9(process, models, tmp_path, monkeypatch):
    """Through train.py's folders; a variant, of the masked process, has one of its own."""
    from experiments import sudoku_story
    monkeypatch.setattr(sudoku, "NUM_EXAMPLES", {9: 400})
    monkeypatch.setattr(sudoku_story, "STEPS", {9: [2]})
    monkeypatch.setattr(sudoku_story, "PRESET", {9: "--preset laptop --no-compile"})
    small = "--updates 1 --batch_size 4 --size 1x1x8"
    monkeypatch.setattr(sudoku_story, "MODELS", {9: {
        "teacher": small, "dcd": small, "idlm": small}})
    monkeypatch.setattr(sudoku_story, "VARIANTS", {"idlm slow": small + " --lr 1e-5"})
    sudoku.main(["--size", "9", "--process", process, "--out", str(tmp_path), "--num_texts", "16",
                 "--device", "cpu", "--empty"])
    records = json.loads((tmp_path / "sudoku.json").read_text(encoding="utf-8"))
    assert list(dict.fromkeys(r["model"] for r in records)) == ["real grids", *models]
    if process == "mdlm":
        slow = checkpoint.load(tmp_path / "idlm-slow/idlm.pt")
        assert slow["lr"] == 1e-5 and slow["start"] == str(tmp_path / "teacher.pt")
        assert slow["block_size"] == 82
    else:
        assert checkpoint.load(tmp_path / "idlm.pt")["start"] == str(tmp_path / "dcd.pt")
    assert (tmp_path / "rules.png").stat().st_size > 5000


def test_empty_grids(examples):
    """The same grids behind one dot that stays."""
    from experiments.sudoku_story import Grids
    puzzles = Puzzles(str(examples / "examples.tsv"), "char", 32, cache=examples)
    grids = Grids(puzzles)
    x_0, free = grids.batch("train", 50, seeded(0))
    same, _ = puzzles.batch("train", 50, seeded(0))
    assert torch.equal(x_0[:, 1:], same[:, 16:]) and (x_0[:, 0] == 1).all()
    assert x_0.shape == (50, grids.block_size)
    assert free[:, 1:].all() and not free[:, 0].any()
    assert grids.key != puzzles.key and grids.K == puzzles.K
    x_0, free = grids.val_blocks(4)
    assert (x_0[:, 0] == 1).all() and not free[:, 0].any()
    assert score(x_0[:, 1:].numpy() - 1, 4)["valid"] == 1


def test_empty_learns_no_puzzle(tmp_path, monkeypatch):
    monkeypatch.setattr(sudoku, "NUM_EXAMPLES", {4: 288})
    with pytest.raises(BadInput, match="leave --puzzle out"):
        sudoku.main(["--out", str(tmp_path), "--empty", "--puzzle", "12" + "." * 14])


@pytest.mark.parametrize("rule", ["token", "token_ties", "token_any", "entropy", "gumbel", "apart",
                                  "exclusive", "units"])
def test_orders_choose_as_many_as_are_due(rule):
    """Of the positions that are left; `units` no two cells of a row, while it can."""
    rng = seeded(0)
    left = torch.zeros(6, 32, dtype=torch.bool)
    left[:, 16:] = torch.rand(6, 16, generator=rng) < 0.7
    left[:, 16:20] = True                                  # the first row
    log_p = torch.randn(6, 32, 4, generator=rng).log_softmax(-1)
    tokens = torch.randint(4, (6, 32), generator=rng)
    due = torch.tensor([0, 1, 2, 3, 4, 4])
    chosen = choose(rule, log_p, tokens, left, due, 4)
    assert (chosen & ~left).sum() == 0 and torch.equal(chosen.sum(1), due)
    if rule == "units":
        assert chosen[2, 16:].view(4, 4).sum(1).max() == 1


@pytest.mark.parametrize("order", ["shuffled", "even", "confident"])
def test_visited_states(order):
    """As many cells are [MASK] as t_tilde says; `confident` uncovers the surest of its own digits
    first."""
    from experiments.visited import latent_of

    def teacher(x, sigma):                  # surer from cell to cell
        return torch.arange(17.0)[:, None] * torch.nn.functional.one_hot(x_0, 6)

    x_0 = torch.randint(2, 6, (8, 17), generator=seeded(0))
    x_0[:, 0] = 1
    t = torch.tensor([0.01, 0.2, 0.3, 0.5, 0.6, 0.7, 0.99, 1.0])
    eps = latent_of(order, teacher)(Masked(7), x_0, t, seeded(1))
    is_masked = eps.x == 6
    assert torch.equal(is_masked.sum(1), (t * 16).ceil().long())
    assert torch.equal(eps.x[~is_masked], x_0[~is_masked]) and not is_masked[:, 0].any()
    assert (eps.sigma == 0).all()
    is_first = is_masked[:, 1:].long().diff(dim=1).le(0).all(1)    # [MASK] to the left alone
    assert (is_first[t * 16 % 2 == 0].all() if order == "confident" else not is_first.all())


@pytest.mark.parametrize("rule", ["random", "shuffled", "gumbel"])
def test_orders_draw_tokens_apart_from_times(rule):
    """Flat rows give flat tokens, whichever are revealed first."""
    def net(x, sigma):
        return torch.zeros(*x.shape, 4)

    net.device = torch.device("cpu")
    tokens = write(net, Masked(5), torch.full((100, 32), -1), 2, rule, 4, seed=0)
    assert abs(tokens.mean() - 1.5) < 0.1                  # 5 standard deviations


@pytest.mark.parametrize("rule, dtype, goes_first", [
    ("token", torch.float64, [0, 0, 200, 0]), ("token_ties", torch.float32, [200, 0, 0, 0]),
    ("token_any", torch.float32, None)])
def test_orders_of_level_tokens(rule, dtype, goes_first):
    """Tokens that float32 takes for certain: the surest one, the first one, any."""
    logits = torch.zeros(200, 4, 2, dtype=dtype)
    logits[..., 1] = torch.tensor([30, 32, 35, 34])
    log_p = logits - logits.logsumexp(-1, keepdim=True)
    all_left = torch.ones(200, 4, dtype=torch.bool)
    torch.manual_seed(0)
    chosen = choose(rule, log_p, all_left.long(), all_left, torch.ones(200).long(), 9)
    counts = chosen.sum(0)
    assert counts.tolist() == goes_first if goes_first else (counts > 30).all()


@pytest.mark.parametrize("steps", [1, 4, 15])
def test_token_is_the_order_confident(steps):
    """Of equal seeds the same texts, to the token."""
    net = random_dit(5, seeded(0))
    prompt = torch.full((30, 16), -1)
    prompt[:, 0] = 1
    tokens = write(net, Masked(5), prompt, steps, "token", 4, seed=3)
    chosen = sample(net, Masked(5), 30, 16, steps, seeded(3), order="confident", prompt=prompt)
    assert np.array_equal(tokens, chosen.tokens.numpy())
    other = write(net, Masked(5), prompt, steps, "token", 4, seed=4)
    assert not np.array_equal(tokens, other)


@pytest.mark.parametrize("flags, said", [
    (["--process", "duo"], "--process duo is not for this script"),
    (["--data", "x.tsv"], "--data x.tsv is not"), (["--resume"], "--resume True is not"),
    (["--text", "a", "--out", "b"], "one of the two"), (["--out", "b", "--lr", "1"], "unrecog")])
def test_orders_refuses(flags, said, tmp_path, monkeypatch, capsys):
    """Before anything is written or trained."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises((BadInput, SystemExit)) as error:
        orders.main(flags)
    assert said in str(error.value) + capsys.readouterr().err and not any(tmp_path.iterdir())


def test_ctrl_c_in_a_run_that_keeps_nothing(tmp_path, monkeypatch):
    from experiments import sudoku_story

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(sudoku, "NUM_EXAMPLES", {4: 288})
    monkeypatch.setattr(sudoku_story, "tell", stop)
    with pytest.raises(BadInput, match="stopped by Ctrl-C: .* start it again"):
        sudoku.main(["--out", str(tmp_path)])


@pytest.mark.parametrize("flags, said", [
    (["--puzzle", "1234"], "4 cells"), (["--puzzle", "5" + "." * 15], "a digit up to 4"),
    (["--size", "5"], "invalid choice"), (["--seed", "-1"], "not in 0"),
    (["--puzzle", "1...1..........."], "digit 1 twice"), (["--puzzle", ""], "empty: give 16"),
    (["--puzzle", "123........4...."], "no grid solves it, so change a clue"),
    (["--size", "9", "--typo", "3"], "typo"),
    (["--block_size", "20"], "leave it out"), (["--lr", "-1"], "not in 0")])
def test_bad_input(flags, said, tmp_path):
    """Said before anything is written."""
    out = tmp_path / "out"
    with pytest.raises(BadInput, match=said):
        sudoku.main([*flags, "--out", str(out)])
    assert not out.exists()


def test_a_folder_holds_one_run(tmp_path):
    from argparse import Namespace
    from experiments.sudoku_story import claim
    mine = dict(size=4, process="mdlm", empty=False, seed=1, out=tmp_path)
    claim(Namespace(**mine))
    claim(Namespace(**mine))
    for other in {"size": 9}, {"process": "duo"}, {"empty": True}, {"seed": 2}:
        with pytest.raises(BadInput, match="was begun with .* choose another folder"):
            claim(Namespace(**mine | other))
    (tmp_path / "sudoku.json").write_text("[]", encoding="utf-8")
    with pytest.raises(BadInput, match="holds a finished story.* or move sudoku.json away"):
        claim(Namespace(**mine))


def test_a_run_of_train_py_is_kept(tmp_path):
    (tmp_path / "log.jsonl").write_text("{}\n", encoding="utf-8")
    with pytest.raises(BadInput, match="holds a run of another script, log.jsonl: choose another"):
        sudoku.main(["--out", str(tmp_path)])
    assert not (tmp_path / "examples.tsv").exists()
