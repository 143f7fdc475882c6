from gmpo.collect import roll_out
from gmpo.rollout.engine import Completion, Request, Sampling
from gmpo.rollout.prompts.encoder import PromptEncoder
from gmpo.rollout.settings import RolloutSettings
from gmpo.rollout.weights.version import PolicyVersion
from tests.tiny import WORDS, tiny_tokenizer


class Scripted:
    """An engine that writes b, c, d, ... and ends every second completion."""

    def publish(self, version):
        raise AssertionError("the caller publishes")

    def generate(self, requests, sampling):
        letters = iter(range(WORDS.index("b"), len(WORDS)))
        return [
            [
                Completion([next(letters), 1], "stop", [-0.1, -0.2]) if number % 2 else
                Completion([next(letters)], "length", None)
                for number in range(request.count)
            ]
            for request in requests
        ]  # fmt: skip

    def close(self):
        pass


def test_rollouts_stand_in_the_order_of_the_requests_with_their_completions_decoded():
    encoder = PromptEncoder(tiny_tokenizer(), RolloutSettings(), eos=(1,), pad=0)
    first, second = encoder.encode([{"prompt": "a"}, {"prompt": "b"}])
    got = roll_out(Scripted(), [Request(first, 2, 0), Request(second, 3, 1)], Sampling(4), encoder)
    assert [rollout.prompt for rollout in got] == [first, first, second, second, second]
    assert [rollout.completion for rollout in got] == ["b", "c", "d", "e", "f"]
    assert [rollout.truncated for rollout in got] == [True, False, True, False, True]
    assert [rollout.sampler_logps for rollout in got] == [
        None,
        [-0.1, -0.2],
        None,
        [-0.1, -0.2],
        None,
    ]
    assert got[1].ids == [WORDS.index("c"), 1]


def test_messages_are_answered_by_a_message():
    encoder = PromptEncoder(tiny_tokenizer(), RolloutSettings(), eos=(1,), pad=0)
    (prompt,) = encoder.encode([{"prompt": [{"role": "user", "content": "a"}]}])
    (rollout,) = roll_out(Scripted(), [Request(prompt, 1, 0)], Sampling(4), encoder)
    assert rollout.completion == [{"role": "assistant", "content": "b"}]


def test_the_version_moves_and_survives_a_resume():
    version = PolicyVersion()
    version.moved()
    version.moved()
    assert version.current == 2
    resumed = PolicyVersion()
    resumed.load_state_dict(version.state_dict())
    assert resumed.current == 2
