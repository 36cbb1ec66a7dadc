"""Rows into micro-batches: every row once, within the budget, nothing of a row lost or mixed up."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_posttrain.batching import idle, pack, packed_tokens, pad_sequences, split, take, to_device
from lit_posttrain.types import MicroBatch, Sequences

LENGTHS = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 20)), min_size=1, max_size=14)


def batch_of(lengths: list[tuple[int, int]]) -> tuple[Sequences, torch.Tensor, dict[str, torch.Tensor]]:
    """Rows in which every token and column entry says which row and position it belongs to."""
    prompts = [[1000 * i + j for j in range(p)] for i, (p, _) in enumerate(lengths)]
    completions = [[1000 * i + p + j for j in range(c)] for i, (p, c) in enumerate(lengths)]
    sequences = pad_sequences(prompts, completions)
    b, s = sequences.ids.shape
    places = 1000.0 * torch.arange(b)[:, None] + torch.arange(s - 1)
    columns = {"advantages": torch.arange(b, dtype=torch.float32), "old_log_probs": places}
    return sequences, sequences.completion_mask(), columns


def test_rows_are_right_padded() -> None:
    sequences = pad_sequences([[5, 6], [7]], [[8], [9, 10, 11]])
    assert sequences.ids.tolist() == [[5, 6, 8, 0], [7, 9, 10, 11]]
    assert sequences.prompt_lengths.tolist() == [2, 1]
    assert sequences.lengths.tolist() == [3, 4]
    assert sequences.attention_mask().tolist() == [[True, True, True, False], [True] * 4]
    # Position i scores token i + 1: the first row's one completion token, the second row's three.
    assert sequences.completion_mask().tolist() == [[False, True, False], [True, True, True]]


def test_prompts_and_completions_must_pair_up() -> None:
    with pytest.raises(ValueError, match="zip"):
        pad_sequences([[1]], [[2], [3]])


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, budget=st.integers(1, 120), data=st.data())
def test_every_chosen_row_is_in_one_micro_batch_within_the_budget(lengths, budget: int, data) -> None:
    sequences, mask, columns = batch_of(lengths)
    chosen = data.draw(st.lists(st.sampled_from(range(len(lengths))), unique=True))
    batches = split(sequences, mask, columns, budget, rows=torch.tensor(chosen, dtype=torch.long))
    assert sorted(i for batch in batches for i in batch.rows.tolist()) == sorted(chosen)
    for batch in batches:
        width = batch.sequences.ids.shape[1]
        assert width == int(batch.sequences.lengths.max())  # trimmed to its longest row
        assert len(batch.rows) * width <= budget or len(batch.rows) == 1
        check_rows(batch, lengths)


def check_rows(batch: MicroBatch, lengths: list[tuple[int, int]]) -> None:
    for k, i in enumerate(batch.rows.tolist()):
        p, c = lengths[i]
        assert batch.sequences.ids[k, : p + c].tolist() == [1000 * i + j for j in range(p + c)]
        assert (int(batch.sequences.prompt_lengths[k]), int(batch.sequences.lengths[k])) == (p, p + c)
        assert batch.mask[k].nonzero()[:, 0].tolist() == list(range(p - 1, p + c - 1))
        assert batch.columns["advantages"][k] == i
        assert batch.columns["old_log_probs"][k].tolist() == [1000 * i + j for j in range(batch.mask.shape[1])]


@settings(max_examples=30, deadline=None)
@given(lengths=LENGTHS, budget=st.integers(1, 120))
def test_all_rows_by_default_and_alike_each_time(lengths, budget: int) -> None:
    sequences, mask, columns = batch_of(lengths)
    torch.manual_seed(budget)
    first = split(sequences, mask, columns, budget)
    again = split(sequences, mask, columns, budget)
    assert sorted(i for batch in first for i in batch.rows.tolist()) == list(range(len(lengths)))
    assert [batch.rows.tolist() for batch in first] == [batch.rows.tolist() for batch in again]


@settings(max_examples=30, deadline=None)
@given(lengths=LENGTHS, budget=st.integers(1, 120))
def test_neighbours_are_alike_in_length(lengths, budget: int) -> None:
    """No micro-batch could take the next longest row as well: none is smaller than it need be."""
    batches = split(*batch_of(lengths), budget)
    totals = [sorted((sum(lengths[i]) for i in batch.rows.tolist()), reverse=True) for batch in batches]
    for current, following in itertools.pairwise(totals):
        assert current[-1] >= following[0]
        assert current[0] * (len(current) + 1) > budget


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), min_size=1, max_size=14), budget=st.integers(1, 90)
)
def test_packed_micro_batches_hold_shared_prompts_once(rows, budget: int) -> None:
    prompts = [[10 * which + j for j in range(1 + 2 * which)] for which, _ in rows]
    completions = [[1000 + 100 * i + j for j in range(n)] for i, (_, n) in enumerate(rows)]
    sequences = pad_sequences(prompts, completions)
    batches = split(sequences, sequences.completion_mask(), {}, budget, packed=True)
    assert sorted(i for batch in batches for i in batch.rows.tolist()) == list(range(len(rows)))
    for batch in batches:
        packed, chosen = pack(batch.sequences), batch.rows.tolist()
        kinds = {rows[i][0] for i in chosen}
        tokens = sum(packed_tokens(1 + 2 * k, [rows[i][1] for i in chosen if rows[i][0] == k]) for k in kinds)
        assert packed.ids.shape[1] == packed.positions.shape[1] == tokens
        assert tokens <= budget or len(chosen) == 1
        for row, i in enumerate(chosen):
            whole = prompts[i] + completions[i]
            read = packed.states[row, : len(whole) - 1]  # the state at token j predicts token j + 1
            assert packed.ids[0, read].tolist() == whole[:-1]
            assert packed.positions[0, read].tolist() == list(range(len(whole) - 1))
        for group in packed.groups:
            assert group.tokens == group.prompt + sum(group.completions)
            assert 0 not in group.completions
        assert sum(group.tokens for group in packed.groups) == tokens


def test_a_packed_row_holds_each_token_that_predicts_once_and_nothing_else() -> None:
    sequences = pad_sequences([[5, 6, 7], [8], [5, 6, 7], [5, 6, 7]], [[1, 2, 3], [4, 9], [], [1]])
    row = pack(sequences)
    assert row.ids.tolist() == [[5, 6, 7, 1, 2, 8, 4]]  # without the last token of each sequence, which predicts none
    assert row.positions.tolist() == [[0, 1, 2, 3, 4, 0, 1]]
    assert [tuple(group) for group in row.groups] == [(0, 3, (2,), False), (5, 1, (1,), False)]
    assert row.states.tolist()[0][:5] == [0, 1, 2, 3, 4]
    assert row.states.tolist()[1][:2] == [5, 6]
    assert packed_tokens(3, [3, 0, 1]) + packed_tokens(1, [2]) == 7


def test_packed_micro_batches_are_filled_up_to_the_budget() -> None:
    """Two completions of 4 and 2 tokens take 3 + 1 after their prompt of 3; the shared prompt is counted once."""
    sequences = pad_sequences([[5, 6, 7]] * 2 + [[8]], [[1] * 4, [1] * 2, [2] * 5])
    mask = sequences.completion_mask()
    for budget, expected in ((12, [[0, 1, 2]]), (11, [[0, 1], [2]]), (7, [[0, 1], [2]]), (6, [[0], [1], [2]])):
        assert [b.rows.tolist() for b in split(sequences, mask, {}, budget, packed=True)] == expected


def test_packed_micro_batches_are_as_few_as_first_fit_makes_them() -> None:
    """Prompts of 2 tokens and an answer each, the last token of which predicts nothing: 5, 3, 5 and 7 tokens."""
    sequences = pad_sequences([[i, i] for i in range(4)], [[9] * 4, [9] * 2, [9] * 4, [9] * 6])
    for together in (None, torch.arange(4)):
        batches = split(sequences, sequences.completion_mask(), {}, 10, packed=True, together=together)
        assert [b.rows.tolist() for b in batches] == [[3, 1], [0, 2]]


def test_a_prompts_answers_are_divided_only_beyond_the_budget() -> None:
    """Its parts follow one another, and what fits whole goes where there is room: 3 + 3 + 1 + 1, 2 + 4 and 1 + 2."""
    sequences = pad_sequences([[5] * 3] * 3 + [[6] * 2, [7]], [[1] * 2, [1] * 4, [1] * 2, [2] * 5, [3] * 3])
    for budget, expected in ((8, [[0, 1, 2], [3], [4]]), (7, [[1, 0], [2, 4], [3]]), (11, [[0, 1, 2, 4], [3]])):
        batches = split(sequences, sequences.completion_mask(), {}, budget, packed=True)
        assert [b.rows.tolist() for b in batches] == expected


def test_parts_of_two_prompts_share_a_micro_batch() -> None:
    """Of 1 and 2 tokens, with four and three answers: 1 + 2 + 2 + 2, then 1 + 2 and 2 + 2, then 2 + 2 + 2."""
    sequences = pad_sequences([[5] * 2] * 3 + [[6]] * 4, [[1] * 3] * 7)
    batches = split(sequences, sequences.completion_mask(), {}, 7, packed=True)
    assert [b.rows.tolist() for b in batches] == [[3, 4, 5], [6, 0], [1, 2]]


@settings(max_examples=60, deadline=None)
@given(
    groups=st.lists(
        st.tuples(st.integers(1, 9), st.lists(st.integers(1, 9), min_size=1, max_size=4)), min_size=1, max_size=9
    ),
    budget=st.integers(1, 60),
)
def test_no_two_packed_micro_batches_would_fit_into_one(groups: list[tuple[int, list[int]]], budget: int) -> None:
    sizes = [packed_tokens(prompt, answers) for prompt, answers in groups]
    prompts = [[i + 1] * prompt for i, (prompt, answers) in enumerate(groups) for _ in answers]
    sequences = pad_sequences(prompts, [[1] * n for _, answers in groups for n in answers])
    of = [i for i, (_, answers) in enumerate(groups) for _ in answers]
    batches = split(sequences, sequences.completion_mask(), {}, budget, packed=True)
    held = [{of[r] for r in batch.rows.tolist()} for batch in batches]
    for i, size in enumerate(sizes):
        places = [k for k, members in enumerate(held) if i in members]
        assert places == list(range(places[0], places[0] + len(places)))
        assert len(places) == 1 or size > budget
    tokens = [pack(batch.sequences).ids.shape[1] for batch in batches]
    for k, j in itertools.combinations(range(len(batches)), 2):
        whole = all(sizes[i] <= budget for i in held[k] | held[j])
        assert not whole or tokens[k] + tokens[j] > budget


@settings(max_examples=30, deadline=None)
@given(
    units=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=7),
    budget=st.integers(1, 90),
    packed=st.booleans(),
)
def test_rows_that_are_compared_stay_together(units: list[list[int]], budget: int, packed: bool) -> None:
    """Units of completions of a prompt of three tokens, their rows interleaved: whole and in order in a micro-batch."""
    rows = sorted((i, unit, n) for unit, lengths in enumerate(units) for i, n in enumerate(lengths))
    sequences = pad_sequences([[100 + unit] * 3 for _, unit, _ in rows], [[1] * n for _, _, n in rows])
    together = torch.tensor([unit for _, unit, _ in rows])
    batches = split(sequences, sequences.completion_mask(), {}, budget, packed=packed, together=together)
    assert sorted(i for batch in batches for i in batch.rows.tolist()) == list(range(len(rows)))
    for batch in batches:
        held = together[batch.rows].tolist()
        for unit in set(held):
            own = [i for i in batch.rows.tolist() if together[i] == unit]
            assert own == (together == unit).nonzero()[:, 0].tolist()
        padded = len(held) * max(3 + rows[i][2] for i in batch.rows.tolist())
        shared = sum(3 + sum(n - 1 for n in units[unit]) for unit in set(held))
        assert (shared if packed else padded) <= budget or len(set(held)) == 1


def test_units_are_as_wide_as_the_longest_of_a_micro_batch() -> None:
    """Two rows of 11 tokens and two of 3: 44 tokens padded to one width; packed 4 + 6 + 6 and 1 + 1 + 1."""
    sequences = pad_sequences([[5] * 4, [6], [5] * 4, [6]], [[1] * 7, [2] * 2, [1] * 7, [2] * 2])
    mask, together = sequences.completion_mask(), torch.tensor([0, 1, 0, 1])
    for packed, budget, expected in (
        *[(False, 44, [[0, 2, 1, 3]]), (False, 43, [[0, 2], [1, 3]]), (False, 1, [[0, 2], [1, 3]])],
        *[(True, 19, [[0, 2, 1, 3]]), (True, 18, [[0, 2], [1, 3]]), (True, 1, [[0, 2], [1, 3]])],
    ):
        batches = split(sequences, mask, {}, budget, packed=packed, together=together)
        assert [b.rows.tolist() for b in batches] == expected


def test_a_packed_row_keeps_the_tokens_that_are_scored() -> None:
    sequences = pad_sequences([[5, 6, 7], [8], [5, 6, 7]], [[1, 2, 3], [4, 9], [1]])
    row = pack(sequences, last=True)
    assert row.ids.tolist() == [[5, 6, 7, 1, 2, 3, 1, 8, 4, 9]]
    assert row.positions.tolist() == [[0, 1, 2, 3, 4, 5, 3, 0, 1, 2]]
    assert [tuple(group) for group in row.groups] == [(0, 3, (3, 1), False), (7, 1, (2,), False)]
    assert [row.states.tolist()[i][n - 1] for i, n in enumerate(sequences.lengths.tolist())] == [5, 9, 6]


def test_a_row_above_the_budget_goes_alone() -> None:
    batches = split(*batch_of([(2, 3), (10, 20), (2, 3)]), 12)
    assert [batch.rows.tolist() for batch in batches] == [[1], [0, 2]]


def test_no_rows_no_micro_batches() -> None:
    assert split(*batch_of([(1, 1)]), 8, rows=torch.zeros(0, dtype=torch.long)) == []


def test_masked_out_positions_stay_masked_out() -> None:
    sequences, mask, columns = batch_of([(2, 3), (1, 4)])
    mask[0] = False
    batch = take(sequences, mask, columns, torch.tensor([1, 0]))
    assert batch.mask.sum(-1).tolist() == [4, 0]


def test_a_micro_batch_owns_its_values() -> None:
    sequences, mask, columns = batch_of([(2, 3), (1, 4)])
    batch = take(sequences, mask, columns, torch.tensor([0, 1]))
    columns["old_log_probs"].fill_(7)
    assert not (batch.columns["old_log_probs"] == 7).any()


def test_an_idle_micro_batch_counts_nowhere() -> None:
    columns = batch_of([(2, 3), (1, 4)])[2]
    batch = idle(columns)
    assert not batch.mask.any()
    assert batch.sequences.completion_mask().any()  # it has a token to score, which the mask leaves out
    assert len(batch.rows) == 0
    assert batch.columns.keys() == columns.keys()
    assert batch.columns["advantages"].shape == (1,)
    assert batch.columns["old_log_probs"].shape == batch.mask.shape == (1, 1)


def test_to_device_moves_all_but_the_row_numbers() -> None:
    """The rows index tensors that stay on the CPU."""
    sequences, mask, columns = batch_of([(2, 3), (1, 4)])
    moved = to_device(take(sequences, mask, columns, torch.tensor([0])), torch.device("meta"))
    tensors = [*moved.sequences, moved.mask, *moved.columns.values()]
    assert {t.device.type for t in tensors} == {"meta"}
    assert moved.rows.device.type == "cpu"
