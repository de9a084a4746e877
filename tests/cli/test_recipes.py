"""Parts of the phases in isolation: the settings of their updates, their evaluations, samples and metrics."""

import datetime
import threading
import types

import jax.numpy as jnp
import numpy as np
import pytest

from jax_rlhf.cli.phases import run_phase
from jax_rlhf.config import run_config
from jax_rlhf.models import Decoder
from jax_rlhf.optim.config import OptimizerConfig
from jax_rlhf.optim.microbatches import plan_batch
from jax_rlhf.ppo import evaluate, train as ppo
from jax_rlhf.reward import train as reward
from jax_rlhf.runtime import supervised_phase as supervised
from jax_rlhf.sft import train as sft
from tests.cli import tiny as cli
from tests.data import tiny as data
from tests.models.test_decoder import tiny_config
from tests.ppo import tiny


def test_the_sft_phase_passes_every_setting_to_its_update():
    optimizer = {"learning_rate": 3e-4, "schedule": "cosine", "warmup_steps": 2}
    settings = {"loss_on": "all", "microbatch_size": 4, "optimizer": optimizer}
    config, model = run_config({"sft": settings}), Decoder(tiny_config())
    spec = sft.training_spec(config.sft, model, 16, 9, trainable_layers=1)
    frozen = model.config.num_layers - 1
    assert (spec.loss.loss_on, spec.microbatches, spec.network.first_layer) == ("all", 4, frozen)
    assert spec.optimizer == OptimizerConfig(**optimizer, total_steps=9)
    assert spec.head_learning_rate is None


def test_the_reward_phase_passes_every_setting_to_its_update():
    optimizer = {"learning_rate": 3e-4, "schedule": "linear"}
    settings = {"trainable_layers": 1, "microbatch_size": 8, "head_learning_rate": 0.1, "optimizer": optimizer}
    model = Decoder(tiny_config(), head="scalar")

    def made(**more):
        return reward.training_spec(run_config({"reward": settings | more}).reward, model, 16, 9)

    spec = made(loss="token")
    assert (spec.loss.loss, spec.loss.compare) == ("token", "pairs")
    assert (spec.microbatches, spec.network.first_layer, spec.head_learning_rate) == (
        2,
        model.config.num_layers - 1,
        0.1,
    )
    assert spec.optimizer == OptimizerConfig(**optimizer, total_steps=9)
    assert made(compare="all", microbatch_size=None).loss.compare == "all"
    with pytest.raises(ValueError, match=r"leave config\.reward\.microbatch_size unset"):
        made(compare="all")


def test_a_schedule_ends_with_its_phase_unless_total_steps_is_set():
    assert OptimizerConfig().with_end(7) == OptimizerConfig(total_steps=7)
    assert OptimizerConfig(total_steps=3).with_end(7).total_steps == 3


def test_the_actors_schedule_excludes_the_critics_warmup():
    settings = tiny.ppo_config(iterations=5, critic_warmup_iterations=2, ppo_epochs=3, num_minibatches=4)
    ends = settings.with_schedule_ends()
    assert (ends.actor.optimizer.total_steps, ends.critic.optimizer.total_steps) == (3 * 12, 5 * 12)
    told = tiny.changed(settings, actor_optimizer=OptimizerConfig(total_steps=8))
    assert told.with_schedule_ends().actor.optimizer.total_steps == 8
    with pytest.raises(ValueError, match="leaves the actor none"):
        tiny.changed(settings, critic_warmup_iterations=5).with_schedule_ends()


def test_the_number_of_steps_follows_from_epochs_unless_it_is_set():
    datasets = types.SimpleNamespace(steps_per_epoch=10)
    assert [supervised.total_steps(None, epochs, datasets) for epochs in (0.01, 0.5, 2.0)] == [1, 5, 20]
    assert supervised.total_steps(3, 2.0, datasets) == 3


def test_a_batch_is_split_into_microbatches_of_the_given_size():
    cut = [plan_batch(12, size, None, where="config.sft").microbatches for size in (None, 12, 4, 1)]
    assert cut == [1, 1, 3, 12]
    with pytest.raises(ValueError, match=r"config\.sft\.microbatch_size=5 .*1, 2, 3, 4, 6, 12"):
        plan_batch(12, 5, None, where="config.sft")


def test_reward_metrics_cover_all_held_out_pairs_and_no_padding(monkeypatch):
    """The second batch has one pair and one padding row. A chosen and a rejected response have equal scores."""
    scores = [([3.0, 1.0], [1.0, 2.0], [True, True]), ([0.5, 99.0], [-1.0, -99.0], [True, False])]
    batches = [tuple(np.asarray(part) for part in batch) for batch in scores]
    monkeypatch.setattr(reward, "batch_pair_scores", lambda network, groups, params, batch: batch)
    monkeypatch.setattr(reward, "put_rows", lambda batch, layout: batch)
    monkeypatch.setattr(reward, "gather_rows", np.asarray)
    logged, notes = [], {}
    logger = types.SimpleNamespace(
        progress_bar=lambda batches, label: batches,
        log_metrics=lambda *line: logged.append(line),
        info=lambda line: None,
    )
    training = types.SimpleNamespace(
        phase=types.SimpleNamespace(logger=logger, notes=notes),
        spec=types.SimpleNamespace(network=None, microbatches=1),
        datasets=types.SimpleNamespace(eval=batches),
        params=None,
        layout=None,
    )
    found = reward._evaluate(training, 3)
    chosen, rejected = [3.0, 1.0, 0.5], [1.0, 2.0, -1.0]
    wins = sum((c > r) + 0.5 * (c == r) for c in chosen for r in rejected)
    assert found == {
        "eval/accuracy": pytest.approx(2 / 3),
        "eval/auc": pytest.approx(wins / 9),
        "eval/margin": pytest.approx((2 - 1 + 1.5) / 3),
        "eval/score_mean": pytest.approx(6.5 / 6),
        "eval/score_std": pytest.approx(np.std(chosen + rejected)),
    }
    assert (logged, notes) == ([(3, found)], found)
    training.datasets.eval = []
    assert reward._evaluate(training, 4) == {}
    assert len(logged) == 1


def test_an_iteration_takes_the_pretraining_texts_of_its_own_index():
    batch = types.SimpleNamespace(tokens=np.array([[4, 5, 6, 0]]), mask=np.array([[True, True, True, False]]))
    other = types.SimpleNamespace(tokens=batch.tokens + 1, mask=batch.mask)
    texts = types.SimpleNamespace(train=[other, other, batch])
    rows = ppo._pretraining_batch(texts, 2)
    np.testing.assert_array_equal(rows.tokens, batch.tokens)
    np.testing.assert_array_equal(rows.mask, batch.mask)
    assert ppo._pretraining_batch(None, 2) is None


def test_pretraining_texts_are_not_packed_even_if_sft_texts_are(tmp_path):
    rows = [{"prompt": text, "completion": "a b"} for text in data.letters(20)]
    data_config = {
        "paths": (data.write(tmp_path / "x.jsonl", rows),),
        "packing": True,
        "sft_batch_size": 2,
        "max_tokens": 24,
    }
    engine = types.SimpleNamespace(tokenizer=data.tokenizer(), generation_config=None, layout=None)
    config = run_config({"data": data_config, "ppo": {"sampling": {"eos_ids": (data.ASSISTANT,)}}})
    batch = ppo._pretraining_texts(None, config.ppo, config.data, engine, 0).train[0]
    assert batch.mask.sum(axis=1).tolist() == [6, 6]
    assert [row[5] for row in batch.tokens] == [data.ASSISTANT] * 2


def test_a_sample_has_only_the_words_of_prompt_and_response():
    """Special tokens and padding slots are left out. The padding slots contain "z", which is not a special token."""
    engine = types.SimpleNamespace(tokenizer=data.tokenizer(), layout=None)
    experience = types.SimpleNamespace(
        tokens=jnp.array([data.ids("z <bos> a b c <eos> z"), data.ids("<eos> <bos> d z z z z")]),
        prompt_mask=jnp.array([[False, True, True], [True, True, True]]),
        response_mask=jnp.array([[True, True, True, False], [True, False, False, False]]),
        scores=jnp.array([0.5, 1.5]),
        logprobs=jnp.array([[-1.0, -2, -3, 0], [-1, 0, 0, 0]]),
        ref_logprobs=jnp.array([[-1.5, -2, -4, 0], [-3, 0, 0, 0]]),
        ended=jnp.array([True, False]),
    )
    trainer = types.SimpleNamespace(engine=engine)
    first = {"step": 3, "split": "eval", "prompt": "a", "response": "b c", "score": 0.5, "kl": 1.5, "length": 3}
    first |= {"ended": True, "columns": {}}
    other = first | {"prompt": "d", "response": "z", "score": 1.5, "kl": 2.0, "length": 1, "ended": False}
    assert evaluate.response_rows(trainer, experience, 3, "eval") == [first, other]
    own = [{"answer": 7}, {"answer": datetime.date(2026, 1, 2)}]
    rows = evaluate.response_rows(trainer, experience, 3, "eval", columns=own)
    # JSON has no dates, so they become strings.
    assert [row["columns"] for row in rows] == [{"answer": 7}, {"answer": "2026-01-02"}]
    assert evaluate.response_rows(trainer, experience, 3, "eval", count=1) == [first]


def test_ppo_logs_displayed_metrics_and_shares_of_an_iterations_time(monkeypatch):
    metrics = {"objective/scores": 1.0, "objective/rlhf_reward": 2.0, "objective/kl": 3.0, "eps": 4.0}
    metrics |= {"objective/response_length": 5.0, "time/generate": 1.0, "time/train": 3.0, "time/iteration": 8.0}
    logged = []
    monkeypatch.setattr(ppo, "response_rows", lambda trainer, experience, step, split, **_: [(step, split)])
    logger = types.SimpleNamespace(
        log_metrics=lambda step, values, **shown: logged.append((step, values, shown)), log_samples=logged.append
    )
    trainer = types.SimpleNamespace(config=types.SimpleNamespace(sample_rows=1))
    prompts = types.SimpleNamespace(columns={}, mask=[])
    ppo._log(types.SimpleNamespace(logger=logger), trainer, 7, prompts, None, metrics)
    shares = {
        "time/generate_share": 1 / 8,
        "time/train_share": 3 / 8,
        "tokens_per_second": 20.0,
        "tokens_per_second/generate": 160.0,  # generation takes an eighth of the iteration's time
    }
    shown = {"reward": 1.0, "kl": 3.0, "length": 5.0, "samples/s": 4.0}
    assert logged == [(7, metrics | shares, shown), [(7, "train")]]


def test_models_are_loaded_while_no_watchdog_runs(tmp_path, monkeypatch):
    """Loading shows no progress for long, and a restarted run would be ended while it loads, again and again."""
    watched, load_model = [], reward.load_model

    def load(*arguments, **options):
        watched.append(any(thread.name == "watchdog" for thread in threading.enumerate()))
        return load_model(*arguments, **options)

    monkeypatch.setattr(reward, "load_model", load)
    config = cli.config(tmp_path)
    config.data.reward_batch_size = config.data.ppo_batch_size = 16
    config.sft_model_path, config.reward.steps, config.reward.normalize_rows = config.model.path, 1, 16
    run_phase("reward", run_config(config), tmp_path / "run")
    assert watched == [False, False]
