"""The step of the SFT and reward phases: losses equal NumPy's, and packing and microbatches do not change them."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from jax_rlhf.data.batches import packed_pairs, pair_batch, text_batch
from jax_rlhf.data.tokens import Example
from jax_rlhf.models.split import SplitModel
from jax_rlhf.optim.config import OptimizerConfig
from jax_rlhf.optim.supervised import TrainingSpec, create_state, evaluate, step, update
from jax_rlhf.parallel import shardings_of
from jax_rlhf.reward.loss import RewardLoss, pair_scores, reward_start
from jax_rlhf.sft.loss import SFTLoss
from tests.ppo import tiny
from tests.programs import equations

LINEAR = OptimizerConfig(learning_rate=300.0, eps=1e3, max_grad_norm=None, beta1=0.0, beta2=0.0)


def examples(count, answers=1, seed=0):
    random = np.random.RandomState(seed)
    text = lambda: random.randint(0, tiny.VOCAB, random.randint(1, 6)).astype(np.int32)  # noqa: E731
    return [Example(text(), tuple(text() for _ in range(answers)), random.rand()) for _ in range(count)]


def sft(network_layers=None, loss_on="completion", microbatches=1):
    policy = tiny.policy()
    spec = TrainingSpec(SplitModel(policy.model, network_layers), SFTLoss(loss_on), LINEAR, None, microbatches)
    return spec, policy


@functools.partial(jax.jit, static_argnums=0)
def _applied(model, params, tokens):
    return model.apply({"params": params}, tokens)


def alone(pretrained, ids):
    """The model's outputs at each token of one text, in float64. Causal attention ignores the ids after the text."""
    row = np.zeros((1, 12), np.int32)
    row[0, : len(ids)] = ids
    return np.asarray(_applied(pretrained.model, pretrained.params, row)[0, : len(ids)], np.float64)


def test_the_sft_loss_equals_that_of_each_text_alone():
    rows = examples(8)
    for loss_on in ("completion", "all"):
        spec, policy = sft(loss_on=loss_on)
        total, count, entropy = 0.0, 0, 0.0
        for example in rows:
            ids = np.concatenate([example.prompt, *example.completions])
            logits = alone(policy, ids)
            logprobs = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
            first = max(1, len(example.prompt) if loss_on == "completion" else 1)
            total -= sum(logprobs[t - 1, ids[t]] for t in range(first, len(ids)))
            count += len(ids) - first
            entropy -= np.sum((np.exp(logprobs) * logprobs)[first - 1 : len(ids) - 1])
        sums = evaluate(spec, *create_state(spec, policy.params), text_batch([[row] for row in rows], 12, 0))
        assert float(sums["count"]) == count
        assert float(sums["loss"]) == pytest.approx(total, rel=1e-5)
        assert float(sums["entropy"]) == pytest.approx(entropy, rel=1e-5)


@pytest.mark.parametrize("layers", [None, 1])
def test_packed_texts_do_not_attend_to_each_other(layers):
    rows = examples(9)
    spec, policy = sft(layers, "all")
    state, frozen = create_state(spec, policy.params)
    apart = evaluate(spec, state, frozen, text_batch([[row] for row in rows], 12, 0))
    together = evaluate(spec, state, frozen, text_batch([rows[:4], rows[4:6], rows[6:]], 40, 3))
    assert float(together["count"]) == float(apart["count"])
    for name in apart:
        assert float(together[name]) == pytest.approx(float(apart[name]), rel=1e-5)


def test_packed_texts_and_pairs_begin_at_position_0():
    """Learned positions show where a text begins. Rotary ones depend only on the distance of two tokens."""
    learned = {"position_kind": "learned", "rotary": None, "max_positions": 64}
    rows, policy = examples(3), tiny.policy(**learned)
    spec = TrainingSpec(SplitModel(policy.model), SFTLoss("all"), LINEAR)
    state, frozen = create_state(spec, policy.params)
    apart = evaluate(spec, state, frozen, text_batch([[row] for row in rows], 12, 0))
    together = evaluate(spec, state, frozen, text_batch([rows], 40, 0))
    assert float(together["loss"]) == pytest.approx(float(apart["loss"]), rel=1e-5)
    pairs, start = examples(3, answers=2), tiny.policy(5, head="scalar", **learned)
    network = SplitModel(start.model)
    apart = pair_scores(network, network.split(start.params), pair_batch(pairs, 12, 0))
    together = pair_scores(network, network.split(start.params), packed_pairs([pairs], 70, 3, 0))
    np.testing.assert_allclose(together[:2], apart[:2], atol=1e-5)


def compared(one, other):
    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.device_get(one)):
        twin = other
        for part in path:
            twin = twin[part.key]
        np.testing.assert_allclose(leaf, twin, atol=2e-5, err_msg=jax.tree_util.keystr(path))


def test_microbatches_give_the_same_update():
    batch = text_batch([[row] for row in examples(8)], 12, 0)
    whole, policy = sft()
    parts = dataclasses.replace(whole, microbatches=4)
    start, frozen = create_state(whole, policy.params)
    before = jax.tree.map(np.asarray, start.trainable)
    one, metrics = update(whole, start, frozen, batch)
    other, _ = update(parts, *create_state(parts, policy.params), batch)
    compared(one.trainable, other.trainable)
    moved = jax.tree.map(lambda a, b: float(np.max(np.abs(a - np.asarray(b)))), before, one.trainable)
    assert max(jax.tree.leaves(moved)) > 1e-3
    assert float(metrics["grad_norm"]) > 0
    for spec, loops in ((whole, 0), (parts, 1)):  # loops of length 4; those over the layers have length 2
        state, frozen = create_state(spec, policy.params)
        traced = step.trace(spec, shardings_of(state), state, frozen, batch)
        assert sum(each.params.get("length") == 4 for each in equations(traced.jaxpr.jaxpr)) == loops


def test_a_non_finite_step_is_skipped():
    spec, policy = sft()
    state, frozen = create_state(spec, policy.params)
    broken = state.replace(trainable=jax.tree.map(lambda leaf: leaf * np.nan, state.trainable))
    after, metrics = update(spec, broken, frozen, text_batch([[row] for row in examples(4)], 12, 0))
    assert (int(after.step), float(metrics["skipped_updates"])) == (1, 1.0)


# ---- the reward phase ----------------------------------------------------------------------------------------------


def scores_by_hand(policy, pairs):
    """The scalar head's value at the last token of each answer, float64[pairs, 2]."""
    scores = []
    for pair in pairs:
        texts = [np.concatenate([pair.prompt, answer]) for answer in pair.completions]
        scores.append([float(alone(policy, text)[-1]) for text in texts])
    return np.array(scores, np.float64)


def reward(**loss):
    start = reward_start(tiny.policy(), None, jax.random.key(3))
    start = dataclasses.replace(start, params=jax.tree.map(lambda leaf: leaf * 1.5, start.params))
    return TrainingSpec(SplitModel(start.model), RewardLoss(**loss), LINEAR), start


def softplus(x):
    return np.log1p(np.exp(x))


@pytest.mark.parametrize("compare", ["pairs", "all"])
def test_bradley_terry_loss_and_metrics_equal_numpy(compare):
    pairs = examples(5, answers=2)
    spec, start = reward(compare=compare)
    by_hand = scores_by_hand(start, pairs)
    if compare == "pairs":
        difference = by_hand[:, 0] - by_hand[:, 1]
        wanted = softplus(np.array([pair.margin for pair in pairs]) - difference)
    else:
        difference = by_hand[:, :1] - by_hand[:, 1]
        wanted = softplus(-difference)
    batch = pair_batch([*pairs, None], 12, 0)  # the last row is empty
    sums = evaluate(spec, *create_state(spec, start.params), batch)
    assert float(sums["count"]) == difference.size
    assert float(sums["loss"]) == pytest.approx(wanted.sum(), rel=1e-4)
    assert float(sums["accuracy"]) == np.sum(difference > 0)
    assert float(sums["margin"]) == pytest.approx(difference.sum(), rel=1e-3, abs=1e-4)
    chosen, rejected, real = pair_scores(spec.network, spec.network.split(start.params), batch)
    assert real.tolist() == [True] * 5 + [False]
    np.testing.assert_allclose(np.stack([chosen, rejected], axis=1)[:5], by_hand, atol=1e-5)


@pytest.mark.parametrize("compare", ["pairs", "all"])
@pytest.mark.parametrize("layers", [None, 1])
def test_packed_pairs_do_not_attend_to_each_other(compare, layers):
    pairs = examples(5, answers=2)
    spec, start = reward(compare=compare)
    spec = dataclasses.replace(spec, network=SplitModel(start.model, layers))
    apart, _ = update(spec, *create_state(spec, start.params), pair_batch(pairs, 12, 0))
    batch = packed_pairs([pairs[:3], [], pairs[3:]], 70, 3, 9)
    together, metrics = update(spec, *create_state(spec, start.params), batch)
    assert float(metrics["count"]) == (5 if compare == "pairs" else 25)
    compared(apart.trainable, together.trainable)
    chosen, rejected, real = pair_scores(spec.network, spec.network.split(start.params), batch)
    by_hand = scores_by_hand(start, pairs)
    np.testing.assert_allclose(np.stack([chosen, rejected], axis=1)[np.asarray(real)], by_hand, atol=1e-5)


def test_the_token_loss_averages_from_the_first_difference():
    prompt, shared = np.array([1, 2], np.int32), np.array([3], np.int32)
    pair = Example(prompt, (np.append(shared, [4, 5]).astype(np.int32), np.append(shared, [6]).astype(np.int32)))
    spec, start = reward(loss="token")
    batch = pair_batch([pair, None], 6, 0)  # the last row is empty
    values = [
        np.asarray(start.model.apply({"params": start.params}, tokens, mask=mask)[0], np.float64)
        for tokens, mask in ((batch.chosen, batch.chosen_mask), (batch.rejected, batch.rejected_mask))
    ]
    wanted = np.mean(softplus(values[1] - values[0])[3:5])
    sums = evaluate(spec, *create_state(spec, start.params), batch)
    assert float(sums["loss"]) == pytest.approx(wanted, rel=1e-4)
    scores = values[0][4], values[1][3]  # at the last tokens
    assert float(sums["margin"]) == pytest.approx(scores[0] - scores[1], rel=1e-4)
    assert (float(sums["accuracy"]), float(sums["count"])) == (float(scores[0] > scores[1]), 1)


def test_a_cut_model_has_the_lower_layers():
    policy = tiny.policy()
    start = reward_start(policy, 1, jax.random.key(0))
    assert start.model.config.num_layers == 1
    batch = pair_batch(examples(3, answers=2), 12, 0)
    hidden = start.model.apply({"params": start.params}, batch.chosen, mask=batch.chosen_mask, method="hidden_states")
    bottom = policy.params | {"layers": jax.tree.map(lambda leaf: leaf[:1], policy.params["layers"])}
    lower = policy.model.apply(
        {"params": bottom}, batch.chosen, mask=batch.chosen_mask, layers=1, method="lower_layers"
    )
    spread = np.sqrt(np.mean(np.square(lower), axis=-1, keepdims=True) + policy.model.config.norm_epsilon)
    np.testing.assert_allclose(hidden, lower / spread * policy.params["final_norm"]["scale"], rtol=1e-4, atol=1e-5)
    assert start.params["scalar_head"]["kernel"].shape == (32, 1)
    assert "lm_head" not in start.params
    with pytest.raises(ValueError, match="num_layers=3 must lie between 1 and the model's 2 layers"):
        reward_start(policy, 3, jax.random.key(0))
