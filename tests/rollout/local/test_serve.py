"""Engines that pull: requests join as they come, samples go on where they stopped."""

from collections import deque
from dataclasses import replace

import pytest
import torch

from gmpo.rollout.engine import Request, Sampling
from gmpo.rollout.local.hf_continuous import ContinuousEngine
from gmpo.types import Prompt
from tests.rollout.cases import ENGINES, EOS, full_logps, only, prompts, requests, shared, tiny
from tests.tiny import WORDS, tiny_model, tiny_tokenizer

every = pytest.mark.parametrize("make", ENGINES.values(), ids=ENGINES.keys())
SAMPLING = Sampling(20, temperature=1.3)


class Turns:
    """Conversations, in which each reply of the model is answered until the turns are over.

    Args:
        late: How often the engine has to ask until an answer is ready.
    """

    def __init__(self, asked, *, turns: int, reply: list[int], budget: int = 6, late: int = 0):
        self.new = deque(asked)
        self.turns, self.reply, self.budget, self.late = turns, reply, budget, late
        self.answers: deque[tuple[int, Request]] = deque()  # (ready after so many calls, request)
        self.open = sum(request.count for request in asked)
        self.calls = 0
        self.written: dict[tuple[int, int], list[tuple[list[int], list[float]]]] = {}
        self.whole: dict[tuple[int, int], list[int]] = {}  # all tokens behind the prompt

    def take(self, room, *, wait):
        assert room >= 1
        self.calls += 1
        taken = [self.new.popleft() for _ in range(min(room, len(self.new)))]
        while self.answers and len(taken) < room and (wait or self.answers[0][0] <= self.calls):
            taken.append(self.answers.popleft()[1])
            wait = False
        return None if not taken and not self.open else taken

    def give(self, request, number, completion):
        key = (request.seed, request.first + number)
        turns = self.written.setdefault(key, [])
        turns.append((completion.ids, completion.logps))
        so_far = [*request.so_far, *completion.ids, *self.reply]
        self.whole[key] = so_far[: len(so_far) - len(self.reply)]
        if len(turns) == self.turns:
            self.open -= 1
            return
        following = replace(
            request, count=1, first=key[1], so_far=so_far, max_new_tokens=self.budget
        )
        self.answers.append((self.calls + self.late, following))


@every
@pytest.mark.parametrize("late", [0, 3])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_conversations_have_the_log_probs_of_one_pass_over_them(make, name, late):
    model, asked = tiny(name), requests(4, 11, 7, count=3)
    work = Turns(asked, turns=3, reply=[5, 6, 7], late=late)
    make(model).serve(work, SAMPLING)
    assert [len(turns) for turns in work.written.values()] == [3] * 9
    for request in asked:
        for number in range(3):
            so_far: list[int] = []
            for ids, logps in work.written[request.seed, number]:
                expected = full_logps(model, request.prompt.ids + so_far, ids, temperature=1.3)
                torch.testing.assert_close(torch.tensor(logps), expected, rtol=1e-4, atol=1e-4)
                so_far += [*ids, 5, 6, 7]


@every
def test_what_is_written_does_not_depend_on_when_requests_come(make):
    model, asked = tiny(), requests(4, 11, 7, count=3)
    runs = []
    for late in (0, 5):
        work = Turns(asked, turns=3, reply=[5, 6, 7], late=late)
        make(model).serve(work, SAMPLING)
        runs.append(work.whole)
    assert runs[0] == runs[1]


@every
def test_a_sample_that_is_cut_and_goes_on_is_the_sample_that_was_not_cut(make):
    """It has the random numbers behind those of the tokens before."""
    engine, (prompt,) = make(tiny()), prompts(6)
    whole = engine.generate([Request(prompt, 4, seed=3)], Sampling(16, extra=only(5, 6, 7)))[0]
    for number, expected in enumerate(whole):
        rest = Request(prompt, 1, 3, first=number, so_far=expected.ids[:7], max_new_tokens=9)
        ((found,),) = engine.generate([rest], Sampling(16, extra=only(5, 6, 7)))
        assert found.ids == expected.ids[7:]
        assert found.finish_reason == "length"


@every
def test_each_request_has_its_budget(make):
    asked = [
        replace(each, max_new_tokens=n) for each, n in zip(requests(4, 9), (2, 30), strict=True)
    ]
    groups = make(tiny()).generate(asked, Sampling(5, extra=only(9)))
    assert [[len(c.ids) for c in group] for group in groups] == [[2] * 3, [30] * 3]


@every
def test_each_request_has_its_texts_that_stop(make):
    a, b = WORDS.index("a"), WORDS.index("b")
    extra = {"suppress_tokens": [t for t in range(len(WORDS)) if t not in (a, b)]}
    asked = [Request(Prompt([a, b], ""), 20, 0, stop=["b b"]), Request(Prompt([b, a], ""), 20, 1)]
    engine = make(tiny_model(), tiny_tokenizer(), eos=(1,))
    stopped, plain = engine.generate(asked, Sampling(12, extra=extra))
    texts = [tiny_tokenizer().decode(completion.ids) for completion in stopped]
    assert all("b b" not in text[:-1] for text in texts)
    assert any(text.endswith("b b") for text in texts)
    assert {completion.finish_reason for completion in plain} == {"length"}


def test_samples_are_given_as_soon_as_they_are_finished():
    """The engine asks for more while rows are at work, and answered rows join them."""
    model, asked = tiny(), requests(4, count=2)
    seen = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    first = replace(asked[0], count=1, max_new_tokens=3)
    long = replace(asked[0], count=1, first=1, max_new_tokens=40)
    work = Turns([first, long], turns=2, reply=[5], budget=3)
    shared(model).serve(work, Sampling(40, extra=only(9)))
    # A token is measured, and two prompts of 4 are read.  The short sample writes 2 tokens in
    # company, leaves, and is read again (4 + 3 + 1 tokens) while the long one goes on.
    assert seen[:5] == [1, 8, 2, 2, 8]
    assert seen[5] == 2


def test_no_more_rows_than_the_limit_are_taken():
    class Counting(Turns):
        def take(self, room, *, wait):
            rooms.append(room)
            return super().take(room, wait=wait)

    rooms: list[int] = []
    work = Counting(requests(*[4] * 9, count=1), turns=1, reply=[])
    shared(tiny(), rows=2).serve(work, Sampling(4))
    assert max(rooms) == 2
    assert len(work.written) == 9


def test_continuous_batching_serves_in_rounds():
    model, asked = tiny(), requests(4, 7, count=2)
    engine = ContinuousEngine(lambda: model, eos=(EOS,), pad=0, options={"page_size": 16})
    work = Turns(asked, turns=2, reply=[5, 6])
    engine.serve(work, Sampling(6))
    for request in asked:
        for number in range(2):
            (ids, logps), _ = work.written[request.seed, number]
            expected = full_logps(model, request.prompt.ids, ids)
            torch.testing.assert_close(torch.tensor(logps), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="can't end completions at a text"):
        engine.generate([replace(asked[0], stop=["a"])], Sampling(6))
