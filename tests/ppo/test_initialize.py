"""How the four models are initialised and saved; the trainer's texts, microbatches and token ids."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_rlhf import PPOTrainer, RewardFunction, RLHFEngine, load_pretrained, save_pretrained
from jax_rlhf.optim.microbatches import microbatch_rows
from jax_rlhf.ppo.config import PPOConfig
from jax_rlhf.ppo.resolve import batch_plan
from jax_rlhf.ppo.trainer import _with_ids
from jax_rlhf.rewards import Failures
from jax_rlhf.rl import Prompts
from jax_rlhf.sampling import Samples
from tests.data import tiny as data
from tests.ppo import tiny


@pytest.fixture(scope="module")
def models():
    """All four models with different parameters. Critic and reward model also have different biases."""
    critic = dataclasses.replace(tiny.policy(3, head="scalar"), reward_bias=0.5, missing_eos_bias=0.1)
    reward = dataclasses.replace(tiny.policy(5, head="scalar"), reward_bias=0.9, missing_eos_bias=0.6)
    return {"actor": tiny.policy(), "reference": tiny.policy(7), "critic": critic, "reward": reward}


def same(one, other):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(one), jax.device_get(other))


def test_each_role_has_its_own_parameters_and_biases(models):
    engine = RLHFEngine(**models)
    same(engine.params.trainable.actor, models["actor"].params)
    same(engine.params.trainable.critic, models["critic"].params)
    same(engine.params.frozen.reference.trainable, models["reference"].params)
    same(engine.params.frozen.reward.trainable, models["reward"].params)
    # The critic values unfinished texts, so its bias is its reward_bias less its missing_eos_bias.
    assert float(engine.params.frozen.critic_bias) == pytest.approx(0.5 - 0.1)
    assert float(engine.params.frozen.reward_bias) == pytest.approx(0.9)
    assert float(engine.params.frozen.missing_eos_bias) == pytest.approx(0.6)
    assert engine.critic.reward_bias == pytest.approx(0.4)
    prompts, model = tiny.ragged_prompts(4), models["critic"].model
    plain = jax.jit(model.apply)({"params": models["critic"].params}, prompts.tokens, mask=prompts.mask)
    values = engine.values(prompts.tokens, prompts.mask)
    np.testing.assert_allclose(np.asarray(values - plain)[prompts.mask], 0.4, atol=1e-5)
    start = RLHFEngine(models["actor"], reward=models["reward"])
    same(start.params.trainable.critic, models["reward"].params)
    assert start.critic.reward_bias == pytest.approx(0.9 - 0.6)
    zero = RLHFEngine(**models, critic_zero_head=True)
    assert not zero.params.trainable.critic["scalar_head"]["kernel"].any()
    assert (float(zero.params.frozen.critic_bias), float(zero.params.frozen.reward_bias)) == (0, pytest.approx(0.9))
    none = RLHFEngine(models["actor"])
    assert not none.params.trainable.critic["scalar_head"]["kernel"].any()
    assert [float(bias) for bias in (none.params.frozen.critic_bias, none.params.frozen.missing_eos_bias)] == [0, 0]


@pytest.mark.parametrize("trainable_layers", [None, 1])
def test_trainable_parameters_are_copies_and_the_reference_is_unchanged(models, trainable_layers):
    """An update donates the buffers of the trainable parameters. The reference stays the initial actor."""
    engine = RLHFEngine(models["actor"], trainable_layers=trainable_layers)
    pointers = lambda tree: {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)}  # noqa: E731
    assert not pointers(engine.params.trainable) & pointers((engine.params.frozen, models["actor"].params))
    prompts = tiny.ragged_prompts(4)
    reference = np.asarray(engine.score(prompts.tokens, prompts.mask)[1])
    moved = jax.tree.map(lambda leaf: leaf * 1.1, engine.params.trainable.actor)
    before = engine.params.trainable
    engine.params = engine.params.replace(trainable=before.replace(actor=moved, actor_ema=before.actor))
    actor, after, _ = engine.score(prompts.tokens, prompts.mask)
    np.testing.assert_array_equal(after, reference)
    assert np.abs(np.asarray(actor) - reference).max() > 0.1
    same(engine.actor_ema.params, models["actor"].params)
    assert not pointers(engine.actor.params) & pointers(engine.params.trainable)


def test_each_role_loads_its_own_checkpoint(models, tmp_path):
    for name, model in models.items():
        save_pretrained(tmp_path / name, model)
    config = {name: {"path": str(tmp_path / name)} for name in ("reference", "critic")}
    config["reward_model"] = {"path": str(tmp_path / "reward")}
    config["model"] = {"path": str(tmp_path / "actor")}
    config["critic"]["trainable_layers"] = 1
    engine = RLHFEngine.create(config)
    assert (engine.models.actor.first_layer, engine.models.critic.first_layer) == (0, 1)
    same(engine.params.frozen.reference.trainable, models["reference"].params)
    same(engine.params.frozen.reward.trainable, models["reward"].params)
    same(engine.critic.params, models["critic"].params)
    config["critic"]["zero_head"] = True
    assert not RLHFEngine.create(config).params.trainable.critic["scalar_head"]["kernel"].any()
    save_pretrained(tmp_path / "again", engine.critic)
    assert load_pretrained(tmp_path / "again", head="scalar").reward_bias == pytest.approx(0.4)


# ---- the trainer's texts, microbatches and token ids ---------------------------------------------------------------


def test_functions_get_the_texts_and_columns_of_each_row():
    """Ids at pads and after EOS do not appear in the texts."""
    prompts = [[data.USER, *data.ids("a b")], data.ids("c")]
    responses = [data.ids("d e <eos>"), data.ids("f")]
    tokens, mask = np.full((2, 7), data.ids("z")[0], np.int32), np.zeros((2, 7), bool)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        tokens[row, 3 - len(prompt) : 3], mask[row, 3 - len(prompt) : 3] = prompt, True
        tokens[row, 3 : 3 + len(response)], mask[row, 3 : 3 + len(response)] = response, True
    asked = []

    def judge(prompts, responses, **columns):
        asked.append((prompts, responses, columns))
        if len(asked) == 1:
            raise OSError("the judge is not at home")
        return [1.0, 2.0]

    models = types.SimpleNamespace(reward=None)
    engine = types.SimpleNamespace(tokenizer=data.tokenizer(), layout=None, models=models)
    config = tiny.ppo_config(reward_retries=1)
    trainer = types.SimpleNamespace(engine=engine, config=config, failures=Failures())
    trainer.reward_functions = (RewardFunction(judge, weight=2.0),)
    samples = Samples(jnp.asarray(tokens), jnp.asarray(mask[:, 3:]), None, None)
    rows = Prompts(tokens[:, :3], mask[:, :3], np.arange(2), {"answer": [7, 8]})
    scores = PPOTrainer._function_scores(trainer, samples, rows)
    np.testing.assert_array_equal(scores, [2.0, 4.0])
    assert asked[1] == (["<user> a b", "c"], ["d e", "f"], {"answer": [7, 8]})
    assert trainer.failures == Failures(failed_calls=1)


def test_a_functions_own_timeout_overrides_the_default():
    functions = [RewardFunction(tiny.fractional_reward, timeout=3.0), RewardFunction(tiny.fractional_reward)]
    trainer = PPOTrainer(RLHFEngine(tiny.policy()), tiny.nested(reward_timeout=9.0), reward_functions=functions)
    assert [function.timeout for function in trainer.reward_functions] == [3.0, 9.0]


def test_microbatches_have_a_budget_of_tokens_per_device():
    assert microbatch_rows(64, 128, 1, "cpu") == 8  # 1,024 tokens
    assert microbatch_rows(64, 128, 2, "cpu") == 16  # 8 rows on each of two devices
    assert microbatch_rows(256, 128, 1, "gpu") == 128  # 16,384
    assert microbatch_rows(60, 128, 1, "cpu") == 6  # the next smaller size that divides 60
    assert microbatch_rows(12, 4096, 4, "cpu") == 4  # one row per device, although that exceeds the budget
    config = tiny.ppo_config(num_minibatches=2, max_new_tokens=64)
    plan = batch_plan(config, 128, 64, None, "cpu")
    assert (plan.microbatch_size, plan.microbatches) == (8, 8)  # a minibatch has 64 rows of 64 + 64 tokens
    plan = batch_plan(dataclasses.replace(config, microbatch_size=32), 128, 64, None, "cpu")
    assert (plan.microbatch_size, plan.microbatches) == (32, 2)


def test_eos_and_pad_ids_default_to_those_of_the_tokenizer():
    engine = types.SimpleNamespace(tokenizer=data.tokenizer(), generation_config=None)
    ids = lambda config: (config.sampling.eos_ids, config.sampling.pad_id)  # noqa: E731
    assert ids(_with_ids(PPOConfig(), engine)) == ((data.EOS,), data.PAD)
    engine.tokenizer = data.tokenizer(pad=None)
    assert _with_ids(PPOConfig(), engine).sampling.pad_id == data.EOS
    assert ids(_with_ids(tiny.ppo_config(eos_ids=(9, 8), pad_id=7), engine)) == ((9, 8), 7)
