"""The trainer: programs are compiled once, seeds repeat samples, metrics are right, and bad input raises errors."""

import dataclasses
import logging

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from jax_rlhf import PPOTrainer, RLHFEngine
from tests.ppo import tiny

ROWS = 16


def scored_engine(**kwargs):
    return RLHFEngine(tiny.policy(), reward=tiny.policy(5, head="scalar"), **kwargs)


def compiled(caplog):
    """Names of the programs that were compiled."""
    return [record.message.split()[1] for record in caplog.records if record.message.startswith("Compiling ")]


@pytest.mark.parametrize(
    ("source", "where"),
    [
        ("function", "anywhere"),
        ("reward model", "one device"),
        ("function", "eight devices"),
        ("reward model", "eight devices"),
    ],
)
def test_five_iterations_compile_each_program_once(source, where, caplog):
    jax.clear_caches()
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "fsdp")) if where == "eight devices" else None
    policy, reward = tiny.policy(), tiny.policy(5, head="scalar") if source == "reward model" else None
    if where == "one device":  # where a loaded checkpoint is
        policy, reward = (
            model and dataclasses.replace(model, params=jax.device_put(model.params, jax.devices()[0]))
            for model in (policy, reward)
        )
    engine = RLHFEngine(policy, reward=reward, mesh=mesh)
    trainer = tiny.trainer(
        engine,
        reward=None if source == "reward model" else tiny.fractional_reward,
        ppo_epochs=2,
        num_minibatches=2,
        ema_decay=0.9,
        kl_target=6.0,
        actor_optimizer={"learning_rate": 1e-3},
        critic_optimizer={"learning_rate": 1e-3},
    )
    programs = [], []
    with caplog.at_level(logging.WARNING), jax.log_compiles():
        for iteration in range(5):
            caplog.clear()
            trainer.train_rlhf(trainer.generate_experience(tiny.ragged_prompts(ROWS, seed=iteration)))
            programs[iteration > 0].extend(compiled(caplog))
    wanted = ["generate"] if source == "reward model" else ["sample", "score"]
    for name in (*wanted, "update"):
        assert programs[0].count(f"jit({name})") == 1
    assert programs[1] == []
    assert int(trainer.state.iteration) == 5


def test_samples_differ_by_row_and_iteration_and_repeat_with_a_seed():
    def run(seed):
        trainer, prompts = tiny.trainer(seed=seed, max_new_tokens=12, eos_ids=()), tiny.prompts(8)
        tokens = []
        for _ in range(2):
            made = trainer.generate_experience(prompts)
            tokens.append(np.asarray(made.tokens[:, 2:]))
            trainer.train_rlhf(made)
        return np.concatenate(tokens)

    first, again, other = run(0), run(0), run(1)
    assert len(np.unique(first, axis=0)) == 16
    np.testing.assert_array_equal(first, again)
    assert not (first == other).all(axis=1).any()


def test_an_experience_stays_valid_after_training_on_it():
    trainer = tiny.trainer()
    made = trainer.generate_experience(tiny.ragged_prompts(ROWS))
    before = np.asarray(made.advantages)
    actor = trainer.engine.actor  # an actor that was read before training stays valid too
    kept = jax.device_get(actor.params)
    trainer.train_rlhf(made)
    np.testing.assert_array_equal(made.advantages, before)
    jax.tree.map(np.testing.assert_array_equal, actor.params, kept)


def test_sampling_filters_warn_and_report_the_kept_mass(caplog):
    trainer = tiny.trainer()
    assert "val/kept_mass" not in trainer.train_rlhf(trainer.generate_experience(tiny.ragged_prompts(ROWS)))
    with caplog.at_level(logging.WARNING, "absl"):
        trainer = tiny.trainer(top_k=3, num_minibatches=2)
    assert "val/kept_mass" in caplog.text
    metrics = trainer.train_rlhf(trainer.generate_experience(tiny.ragged_prompts(ROWS)))
    assert 0.3 < metrics["val/kept_mass"] < 0.99
    # Log-probs are still those of the whole softmax.
    assert metrics["val/sampler_logprob_gap"] < 1e-4
    assert metrics["val/first_ratio_gap"] < 1e-5


def test_a_missing_eos_id_gives_a_warning(caplog):
    with caplog.at_level(logging.WARNING, "absl"):
        trainer = tiny.trainer(eos_ids=None)
    assert "no EOS id found" in caplog.text
    assert trainer.config.sampling.eos_ids == ()


def test_metrics_have_the_names_of_trl():
    """All names of TRL's PPO trainer, except `episode` and `global_step`, which the training loop counts."""
    trainer = tiny.trainer(ppo_epochs=2, missing_eos_penalty=1.0)
    made = trainer.generate_experience(tiny.ragged_prompts(ROWS))
    metrics = trainer.train_rlhf(made)
    assert {
        "eps", "objective/kl", "objective/entropy", "objective/non_score_reward", "objective/rlhf_reward",
        "objective/scores", "policy/approxkl_avg", "policy/clipfrac_avg", "loss/policy_avg", "loss/value_avg",
        "val/clipfrac_avg", "policy/entropy_avg", "val/ratio", "val/ratio_var", "val/num_eos_tokens", "lr",
    } <= set(metrics)  # fmt: skip
    assert all(type(value) is float for value in metrics.values())
    lengths = np.asarray(made.response_mask).sum(axis=1)
    np.testing.assert_allclose(metrics["objective/response_length"], lengths.mean(), rtol=1e-6)
    ended = (np.asarray(made.tokens[:, 5:]) == tiny.EOS).any(axis=1)
    assert metrics["val/num_eos_tokens"] == ended.sum()
    np.testing.assert_allclose(metrics["objective/eos_rate"], ended.mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["objective/scores"], np.mean(made.scores), rtol=1e-5)
    values, returns = (np.asarray(x)[np.asarray(made.response_mask)] for x in (made.values, made.returns))
    explained = 1 - np.var(returns - values) / np.var(returns)
    np.testing.assert_allclose(metrics["val/explained_variance"], explained, atol=1e-5)
    np.testing.assert_allclose(metrics["objective/entropy"], -np.sum(made.logprobs) / ROWS, rtol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"kl_reduction": "mean"},
        {"kl_kind": "k3", "reward_clip": 0.3},
        {"missing_eos_penalty": 0.7, "kl_reduction": "mean", "kl_kind": "abs"},
    ],
)
def test_the_rlhf_reward_metric_is_the_optimised_reward(settings):
    """objective/rlhf_reward is the sum of the rewards per response, averaged over responses."""
    engine = RLHFEngine(tiny.policy(), reference=tiny.policy(7))
    trainer = tiny.trainer(engine, kl_coef=0.3, whiten_rewards=False, **settings)
    made = trainer.generate_experience(tiny.ragged_prompts(ROWS))
    metrics = trainer.train_rlhf(made)
    total = np.sum(made.rewards) / ROWS
    np.testing.assert_allclose(metrics["objective/rlhf_reward"], total, rtol=1e-5)
    clip = settings.get("reward_clip", np.inf)
    shaped = np.clip(made.scores, -clip, clip) - settings.get("missing_eos_penalty", 0) * ~np.asarray(made.ended)
    np.testing.assert_allclose(metrics["objective/non_score_reward"], total - np.mean(shaped), rtol=1e-4)
    assert abs(metrics["objective/non_score_reward"]) > 1e-3
    if not settings:
        np.testing.assert_allclose(
            metrics["objective/rlhf_reward"], metrics["objective/scores"] - 0.3 * metrics["objective/kl"], rtol=1e-5
        )


# ---- bad input -----------------------------------------------------------------------------------------------------


def test_invalid_arguments_of_the_trainer_are_errors():
    engine = RLHFEngine(tiny.policy())
    with pytest.raises(ValueError, match="there is no source of rewards"):
        PPOTrainer(engine, {})
    named = {"reward": {"functions": ("tests.cli.tiny:count_a",)}}
    with pytest.raises(ValueError, match=r"config\.ppo\.reward\.functions .*: pass them as reward_functions"):
        PPOTrainer(RLHFEngine(tiny.policy(), reward=tiny.policy(3, head="scalar")), named)
    with pytest.raises(ValueError, match=r"config\.ppo\.kl\.coeff does not exist; did you mean coef"):
        PPOTrainer(engine, {"kl": {"coeff": 0.1}}, reward_functions=tiny.fractional_reward)
    with pytest.raises(ValueError, match="temperature=0"):
        PPOTrainer(engine, {"sampling": {"temperature": 0.0}}, reward_functions=tiny.fractional_reward)
    silent = RLHFEngine(dataclasses.replace(tiny.policy(), tokenizer=None))
    with pytest.raises(ValueError, match="the actor has no tokenizer"):
        PPOTrainer(silent, {}, reward_functions=tiny.fractional_reward)


@pytest.mark.parametrize(
    ("rows", "devices", "config", "message"),
    [
        (
            10,
            1,
            {"num_minibatches": 4},
            "10 rows cannot be cut evenly into config.ppo.num_minibatches=4 .* × 1 row shards = 4 rows",
        ),
        (12, 1, {"microbatch_size": 5}, "microbatch_size=5 does not divide a batch of 12 rows.*1, 2, 3, 4, 6, 12"),
        (12, 8, {}, "12 rows cannot be cut evenly into the mesh's 8 row shards.*a multiple of 8 row shards = 8 rows"),
        (16, 8, {"microbatch_size": 4}, "sizes that do: 8, 16"),
    ],
)
def test_rows_that_cannot_be_divided_are_errors_before_anything_runs(rows, devices, config, message):
    mesh = None if devices == 1 else Mesh(np.array(jax.devices()).reshape(8, 1), ("data", "fsdp"))
    trainer = tiny.trainer(RLHFEngine(tiny.policy(), mesh=mesh), **config)
    with pytest.raises(ValueError, match=message):
        trainer.generate_experience(tiny.ragged_prompts(rows))


@pytest.mark.parametrize("devices", [1, 8])
def test_non_finite_scores_are_logged_with_the_text_and_skip_the_update(devices, caplog):
    mesh = None if devices == 1 else Mesh(np.array(jax.devices()), ("data",))
    trainer = tiny.trainer(scored_engine(mesh=mesh), reward=None)
    experience = trainer.generate_experience(tiny.ragged_prompts(ROWS))
    before = jax.device_get(trainer.engine.params.trainable)
    bad = experience.replace(scores=experience.scores.at[5].set(np.nan))
    row = np.asarray(experience.tokens[5, 5:])[np.asarray(experience.response_mask[5])]
    text = " ".join(tiny.WORDS[token] for token in row)
    for bad_steps in (1, 2):
        metrics = trainer.train_rlhf(bad)
        assert metrics["val/bad_steps"] == metrics["val/skipped_updates"] == bad_steps
    assert "1 of 16 responses have a score that is not finite, first row 5 with nan" in caplog.text
    assert f"response '{text}'" in caplog.text
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(trainer.engine.params.trainable), before)
    assert trainer.train_rlhf(experience)["val/bad_steps"] == 0


def test_an_empty_prompt_is_an_error():
    prompts = tiny.ragged_prompts(4)
    prompts.mask[2] = False
    with pytest.raises(ValueError, match="prompt 2 is empty"):
        tiny.trainer().generate_experience(prompts)


def test_a_reward_function_may_ask_for_special_tokens():
    """A function gets texts with special tokens only if it has a parameter for them."""
    seen = []

    def judge(prompts, responses, prompts_with_special_tokens, responses_with_special_tokens):
        seen.append((prompts, responses, prompts_with_special_tokens, responses_with_special_tokens))
        return [1.0] * len(responses)

    engine = RLHFEngine(tiny.policy())
    engine.tokenizer.add_special_tokens({"additional_special_tokens": tiny.WORDS[4:7]})
    trainer = tiny.trainer(engine, reward=judge)
    experience = trainer.generate_experience(tiny.ragged_prompts(ROWS))
    ((prompts, responses, all_prompts, all_responses),) = seen
    width = experience.prompt_mask.shape[1]
    tokens, mask = np.asarray(experience.tokens), np.asarray(experience.response_mask)
    whole = [" ".join(tiny.WORDS[i] for i in row[width:][real]) for row, real in zip(tokens, mask, strict=True)]
    assert all_responses == whole
    without = [" ".join(word for word in text.split() if word not in tiny.WORDS[4:7]) for text in whole]
    assert responses == without != whole
    assert [text.split() for text in prompts] == [
        [word for word in text.split() if word not in tiny.WORDS[4:7]] for text in all_prompts
    ]


def test_failures_of_reward_functions_are_counted_per_iteration():
    calls = []

    def flaky(prompts, responses, **columns):
        calls.append(len(responses))
        if len(calls) in (1, 4, 5):
            raise OSError("the judge is not at home")
        return [1.0] * len(responses)

    options = {"reward_retries": 1, "on_reward_failure": "penalize", "reward_failure_score": -3.0}
    trainer = tiny.trainer(reward=flaky, **options)
    counts = []
    for _ in range(3):
        experience = trainer.generate_experience(tiny.ragged_prompts(ROWS))
        metrics = trainer.train_rlhf(experience)
        counts.append([metrics[f"reward/{name}"] for name in ("failed_calls", "timeouts", "penalized")])
        assert float(experience.scores[0]) == (-3 if len(calls) == 5 else 1)
    assert counts == [[1, 0, 0], [0, 0, 0], [2, 0, ROWS]]
