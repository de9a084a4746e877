"""The engine: four models from checkpoints or parameters, what they share, and its methods."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from jax_rlhf import CheckpointError, Pretrained, RLHFEngine, load_pretrained, sample, save_pretrained, token_logprobs
from jax_rlhf.models import Decoder, init_params, model_jit
from jax_rlhf.sampling import Sampling
from jax_rlhf.sampling.logprobs import score_hidden
from tests.ppo import tiny


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """An actor and a reward model as Hugging Face folders."""
    root = tmp_path_factory.mktemp("engine")
    save_pretrained(root / "actor", tiny.policy())
    save_pretrained(root / "reward", tiny.policy(5, head="scalar"))
    return root


def batch(rows=4):
    prompts = tiny.ragged_prompts(rows)
    return prompts.tokens, prompts.mask


def pointers(tree):
    return {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)}


def test_four_models_from_two_checkpoints(folders):
    config = {
        "model": {"path": str(folders / "actor")},
        "reward_model": {"path": str(folders / "reward")},
        "ppo": {"any": 1},
    }
    engine = RLHFEngine.create(config)
    tokens, mask = batch()
    actor, reward = load_pretrained(folders / "actor"), load_pretrained(folders / "reward", head="scalar")
    logprobs, ref_logprobs, entropy = engine.score(tokens, mask)
    wanted = token_logprobs(actor.model, actor.params, tokens, mask)
    real = mask[:, 1:] & mask[:, :-1]
    np.testing.assert_allclose(np.asarray(logprobs)[real], np.asarray(wanted)[real], atol=1e-5)
    np.testing.assert_array_equal(logprobs, ref_logprobs)
    assert (np.asarray(entropy)[real] > 0).all()
    values = engine.values(tokens, mask)
    # The critic starts as the reward model.
    np.testing.assert_allclose(values[:, -1], engine.reward(tokens, mask), atol=1e-5)
    whole = jax.jit(reward.model.apply)({"params": reward.params}, tokens, mask=mask)
    np.testing.assert_allclose(np.asarray(values)[mask], np.asarray(whole)[mask], atol=1e-5)
    # An update donates the trainable buffers, so frozen parameters must not share them.
    assert not pointers(engine.params.trainable) & pointers(engine.params.frozen)


def test_the_reference_is_the_initial_actor_without_a_second_copy():
    """Frozen models share the given parameters. Trainable models get a copy."""
    start = tiny.policy()
    engine = RLHFEngine(start)
    assert pointers(engine.params.frozen.reference) <= pointers(start.params)
    assert not pointers(engine.params.trainable) & pointers(start.params)
    np.testing.assert_array_equal(engine.values(*batch()), 0)  # the critic's head starts at zero
    cut = RLHFEngine(start, trainable_layers=1)
    frozen = cut.params.frozen
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (frozen.actor, frozen.reference)]
    assert sum(sizes) == sum(leaf.size for leaf in jax.tree.leaves(start.params))  # bottom and top are each stored once


def test_reference_and_critic_can_be_separate_models():
    reference, critic = tiny.policy(7), tiny.policy(8, head="scalar", num_layers=1)
    engine = RLHFEngine(tiny.policy(), reference=reference, critic=critic, trainable_layers=1)
    tokens, mask = batch()
    _, ref_logprobs, _ = engine.score(tokens, mask, temperature=0.7)
    wanted = token_logprobs(reference.model, reference.params, tokens, mask, temperature=0.7)
    real = mask[:, 1:] & mask[:, :-1]
    np.testing.assert_allclose(np.asarray(ref_logprobs)[real], np.asarray(wanted)[real], atol=1e-5)
    whole = jax.jit(critic.model.apply)({"params": critic.params}, tokens, mask=mask)
    np.testing.assert_allclose(np.asarray(engine.values(tokens, mask))[mask], np.asarray(whole)[mask], atol=1e-5)


@pytest.mark.parametrize("trainable_layers", [None, 1])
def test_a_critic_starts_as_the_reward_model_or_with_a_zero_head(trainable_layers):
    reward = dataclasses.replace(tiny.policy(5, head="scalar"), reward_bias=0.3, missing_eos_bias=0.7)
    tokens, mask = batch()
    starts = [
        RLHFEngine(tiny.policy(), reward=reward, critic_trainable_layers=trainable_layers, critic_zero_head=zero_head)
        for zero_head in (False, True)
    ]
    scores = jax.jit(reward.model.apply)({"params": reward.params}, tokens, mask=mask)
    values = np.asarray(starts[0].values(tokens, mask))
    # Values are of unfinished texts, so they include missing_eos_bias.
    np.testing.assert_allclose(values[mask], np.asarray(scores)[mask] + 0.3 - 0.7, atol=1e-5)
    np.testing.assert_array_equal(starts[1].values(tokens, mask), 0)
    np.testing.assert_allclose(starts[0].reward(tokens, mask), starts[1].reward(tokens, mask), atol=1e-6)
    np.testing.assert_allclose(starts[1].reward(tokens, mask), scores[:, -1] + 0.3, atol=1e-5)


@pytest.mark.parametrize("trainable_layers", [None, 1])
def test_the_engine_samples_the_same_as_the_sampler(trainable_layers):
    start = tiny.policy()
    engine = RLHFEngine(start, trainable_layers=trainable_layers)
    tokens, mask = batch()
    key, rows = jax.random.key(2), jnp.arange(4)
    ours = engine.sample(jnp.asarray(tokens), jnp.asarray(mask), rows, key, Sampling(6, eos_ids=(2,)))
    wanted = sample(start.model, start.params, tokens, mask, key, max_new_tokens=6, eos_id=2)
    np.testing.assert_array_equal(ours.tokens, wanted.tokens)
    np.testing.assert_allclose(ours.logprobs, wanted.logprobs, atol=1e-5)


def test_trained_models_can_be_saved_and_loaded(tmp_path, folders):
    engine = RLHFEngine.create({"model": {"path": str(folders / "actor"), "trainable_layers": 1}})
    trainer = tiny.trainer(engine)
    trainer.train_rlhf(trainer.generate_experience(tiny.ragged_prompts(8)))
    save_pretrained(tmp_path / "actor", engine.actor)
    save_pretrained(tmp_path / "critic", engine.critic)
    again = RLHFEngine.create(
        {"model": {"path": str(tmp_path / "actor")}, "critic": {"path": str(tmp_path / "critic")}}
    )
    tokens, mask = batch()
    np.testing.assert_allclose(again.score(tokens, mask)[0], engine.score(tokens, mask)[0], atol=1e-5)
    np.testing.assert_allclose(again.values(tokens, mask), engine.values(tokens, mask), atol=1e-5)
    first = RLHFEngine.create({"model": {"path": str(folders / "actor")}})
    assert np.abs(first.score(tokens, mask)[0] - engine.score(tokens, mask)[0]).max() > 1e-4


def test_bfloat16_compute_keeps_float32_parameters(folders):
    engine = RLHFEngine.create({"model": {"path": str(folders / "actor"), "dtype": "bfloat16", "remat": "full"}})
    assert {leaf.dtype for leaf in jax.tree.leaves(engine.params.trainable)} == {jnp.dtype("float32")}
    trainer = tiny.trainer(engine, num_minibatches=2)
    metrics = trainer.train_rlhf(trainer.generate_experience(tiny.ragged_prompts(8)))
    assert metrics["val/first_ratio_gap"] < 0.1
    assert metrics["val/sampler_logprob_gap"] < 0.2
    assert metrics["objective/kl"] == 0
    assert metrics["val/skipped_updates"] == 0


def test_invalid_configs_and_incompatible_models_are_errors(folders, tmp_path):
    path = str(folders / "actor")
    for config, message in [
        ({}, r"config\.model\.path is not set"),
        ({"model": {"paht": path}}, r"config\.model\.paht does not exist; did you mean path"),
        ({"model": {"path": path, "trainable_layers": 3}}, "trainable_layers=3 must be from 1 to the model's 2"),
        (
            {"model": {"path": path}, "reward_model": {"path": path, "trainable_layers": 1}},
            "PPO freezes the reference and the reward model",
        ),
        ({"model": {"path": path, "dtype": "float8"}}, r"config\.model\.dtype='float8'"),
        ({"model": {"path": path, "remat": "some"}}, r"config\.model\.remat='some'"),
    ]:
        with pytest.raises(ValueError, match=message):
            RLHFEngine.create(config)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        RLHFEngine.create({"model": {"path": str(tmp_path / "nowhere")}})
    with pytest.raises(ValueError, match="reward has a 'lm' head"):
        RLHFEngine(tiny.policy(), reward=tiny.policy())
    with pytest.raises(ValueError, match="actor has a 'scalar' head"):
        RLHFEngine(tiny.policy(head="scalar"))
    longer = tiny.policy(5)
    longer.tokenizer.add_tokens(["w9"])
    with pytest.raises(ValueError, match=r"reward has another tokenizer .*1 of 9 tokens differ, first 'w9'"):
        RLHFEngine(longer, reward=tiny.policy(5, head="scalar"))
    small = dataclasses.replace(tiny.policy(5, head="scalar", vocab_size=7), tokenizer=None)
    with pytest.raises(ValueError, match="critic has a vocabulary of 7 ids, but the tokenizer has 8"):
        RLHFEngine(tiny.policy(), critic=small)
    with pytest.raises(ValueError, match=r"config\.reward_model\.path"):
        RLHFEngine(tiny.policy()).reward(*batch())


@pytest.mark.parametrize("padded", [None, 16])
@pytest.mark.parametrize("trainable_layers", [None, 1])
def test_ids_that_are_not_tokens_have_no_probability(padded, trainable_layers):
    """The embedding has 13 rows, but the tokenizer has only 8 tokens, with ids up to 9."""
    ids = [0, 1, 2, 3, 4, 6, 7, 9]  # 5, 8, and the ids above 9 are not tokens
    bare = Tokenizer(WordLevel({f"w{index}": index for index in ids}, unk_token="w0"))
    actor = tiny.policy(vocab_size=13, padded_vocab_size=padded)
    actor = dataclasses.replace(actor, tokenizer=PreTrainedTokenizerFast(tokenizer_object=bare))
    engine = RLHFEngine(actor, trainable_layers=trainable_layers)
    tokens, mask = batch(rows=8)
    tokens = np.where(tokens == 5, 6, tokens)
    sampling = Sampling(max_new_tokens=24, temperature=0.7)
    samples = engine.sample(tokens, mask, np.arange(8), jax.random.key(0), sampling)
    width = tokens.shape[1]
    assert set(np.unique(samples.tokens[:, width:])) == set(ids)
    whole = np.concatenate([mask, samples.response_mask], axis=1)
    found = engine.score(samples.tokens, whole, start=width, temperature=0.7)
    np.testing.assert_allclose(found[0], samples.logprobs, atol=1e-4)
    logits = np.asarray(actor.model.apply({"params": actor.params}, samples.tokens, mask=whole), np.float64)
    logp = jax.nn.log_softmax(jnp.asarray(logits[:, width - 1 : -1, ids] / 0.7))
    places = np.searchsorted(ids, samples.tokens[:, width:])
    expected = np.take_along_axis(np.asarray(logp), places[..., None], axis=-1)[..., 0]
    for one in found[:2]:  # the reference is the actor
        np.testing.assert_allclose(one, expected, atol=1e-4)
    np.testing.assert_allclose(found[2], -np.sum(np.exp(logp) * logp, axis=-1), atol=1e-4)
    saved = engine.actor.model.config
    assert (saved.vocab_size, saved.absent_ids) == (13, ())


def test_absent_ids_have_no_gradient():
    """The gradients of all ids stay finite, also at a low temperature."""
    start = tiny.policy(vocab_size=13)
    model = start.model.clone(config=start.model.config.limited_to(10, (5, 8, 11)))
    assert model.config.absent_ids == (5, 8)
    tokens, mask = batch()
    tokens = np.where(tokens == 5, 6, tokens)
    for temperature in (0.01, 1.0):

        def loss(params, temperature=temperature):
            hidden = model.apply({"params": params}, tokens, mask=mask, method="hidden_states")
            logprobs, entropy = score_hidden(model, params, hidden, tokens, temperature=temperature)
            return jnp.sum(logprobs) + jnp.sum(entropy)

        rows = jax.grad(loss)(start.params)["lm_head"]["kernel"]
        assert np.isfinite(rows).all()
        assert not rows[jnp.asarray([5, 8, 10, 11, 12])].any()
        assert rows[jnp.asarray([0, 9])].any()


def test_a_reward_model_may_have_more_tokens_than_the_policy():
    """TRL adds a pad token to its reward models. Ids that both models have must be the same tokens."""
    reward = tiny.policy(5, head="scalar", vocab_size=9)
    reward.tokenizer.add_tokens(["w9"])
    engine = RLHFEngine(tiny.policy(), reward=reward)
    tokens, mask = batch()
    assert np.isfinite(engine.reward(tokens, mask)).all()


def test_a_reward_model_without_a_head_is_an_error(folders, tmp_path):
    """Without an error, every text would score 0."""
    path = str(folders / "actor")
    with pytest.raises(CheckpointError, match=r"config\.reward_model\.path=.* it has no scalar head"):
        RLHFEngine.create({"model": {"path": path}, "reward_model": {"path": path}})
    RLHFEngine.create({"model": {"path": path}, "critic": {"path": path}})  # a critic's values may start at zero
    save_pretrained(tmp_path / "reward", tiny.policy(5, head="scalar"))
    file = tmp_path / "reward" / "model.safetensors"
    save_file({name: array for name, array in load_file(file).items() if name != "score.weight"}, file)
    for role in ("reward_model", "critic"):
        with pytest.raises(CheckpointError, match=r"LlamaForSequenceClassification, but it has no score\.weight"):
            RLHFEngine.create({"model": {"path": path}, role: {"path": str(tmp_path / "reward")}})


def test_models_are_sharded_over_a_mesh():
    mesh = Mesh(np.array(jax.devices()).reshape(1, 2, 4), ("data", "fsdp", "tensor"))
    one, eight = RLHFEngine(tiny.policy()), RLHFEngine(tiny.policy(), mesh=mesh)
    kernel = eight.params.trainable.actor["layers"]["mlp"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.size * 8 == kernel.size
    tokens, mask = batch()
    for first, second in zip(one.score(tokens, mask), eight.score(tokens, mask), strict=True):
        np.testing.assert_allclose(np.asarray(first)[mask[:, 1:]], np.asarray(second)[mask[:, 1:]], atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_a_vocabulary_that_the_mesh_does_not_divide_is_padded(tied, tmp_path):
    """Over tensor=4, 13 ids are padded to 16 rows and 9 ids to 12. Saving removes the padding."""
    mesh = Mesh(np.array(jax.devices()).reshape(1, 2, 4), ("data", "fsdp", "tensor"))
    config = tiny.policy(vocab_size=13).model.config.replace(tie_embeddings=tied)
    model = Decoder(config)
    actor = Pretrained(model, jax.tree.map(lambda leaf: 2 * leaf, init_params(model, jax.random.key(1))))
    reward = dataclasses.replace(tiny.policy(5, head="scalar", vocab_size=9), tokenizer=None)
    options = {"reward": reward, "reference_config": config.replace(remat="full"), "trainable_layers": 1}
    one, eight = RLHFEngine(actor, **options), RLHFEngine(actor, **options, mesh=mesh)
    assert eight.models.actor.model.config.table_rows == 16
    assert eight.models.reward.model.config.table_rows == 12
    tokens, mask = batch()
    real = mask[:, 1:] & mask[:, :-1]
    for first, second in zip(one.score(tokens, mask), eight.score(tokens, mask), strict=True):
        np.testing.assert_allclose(np.asarray(first)[real], np.asarray(second)[real], atol=1e-5)
    np.testing.assert_allclose(one.reward(tokens, mask), eight.reward(tokens, mask), atol=1e-5)
    sampling = Sampling(max_new_tokens=12)
    first, second = (engine.sample(tokens, mask, np.arange(4), jax.random.key(0), sampling) for engine in (one, eight))
    np.testing.assert_array_equal(first.tokens, second.tokens)
    assert int(first.tokens.max()) < 9  # only ids that both models have
    save_pretrained(tmp_path, eight.actor)
    again = load_pretrained(tmp_path)
    for path, leaf in jax.tree.leaves_with_path(actor.params):
        saved = dict(jax.tree.leaves_with_path(again.params))[path]
        np.testing.assert_allclose(leaf, saved, atol=1e-6, err_msg=str(path))


def test_only_an_untied_head_is_trainable_above_frozen_layers():
    model = Decoder(dataclasses.replace(tiny.policy().model.config, tie_embeddings=True))
    start = dataclasses.replace(tiny.policy(), model=model, params=init_params(model, jax.random.key(0)))
    engine = RLHFEngine(start, trainable_layers=1)
    assert "embedding" not in engine.params.trainable.actor
    assert "lm_head" not in engine.params.trainable.actor
    untied = RLHFEngine(tiny.policy(tie_embeddings=False), trainable_layers=1)
    assert "lm_head" in untied.params.trainable.actor


# ---- dtype, remat, attention, vocabulary and positions of each model -----------------------------------------------


def how_it_runs(network):
    config = network.model.config
    return config.dtype.name, config.remat, config.attention


def test_models_without_a_path_use_their_own_dtype_and_remat(folders):
    """Unset settings are the policy's. The critic does not inherit those of the reward model."""
    model = {"path": str(folders / "actor"), "remat": "none"}
    reward = {"path": str(folders / "reward"), "dtype": "bfloat16", "remat": "full"}
    engine = RLHFEngine.create({"model": model, "reward_model": reward})
    runs = {role: how_it_runs(getattr(engine.models, role)) for role in ("actor", "reference", "critic", "reward")}
    plain = "float32", "none", "xla"
    assert runs == {"actor": plain, "reference": plain, "critic": plain, "reward": ("bfloat16", "full", "xla")}
    own = {"critic": {"dtype": "bfloat16", "remat": "full"}, "reference": {"dtype": "bfloat16", "attention": "flash"}}
    for models in ({"model": model, "reward_model": reward}, {"model": model}):
        engine = RLHFEngine.create(models | own)
        assert how_it_runs(engine.models.critic) == ("bfloat16", "full", "xla")
        assert how_it_runs(engine.models.reference) == ("bfloat16", "none", "flash")
        assert how_it_runs(engine.models.actor) == plain
    with pytest.raises(
        ValueError, match=r"config\.critic\.revision='main' has no effect without a hub id; set config\.critic\.path"
    ):
        RLHFEngine.create({"model": model, "critic": {"revision": "main"}})


@pytest.mark.parametrize("trainable_layers", [None, 1])
def test_models_that_share_layers_compute_in_their_own_dtype(folders, trainable_layers):
    """Models share the parameters of the frozen bottom layers, but their output only if both compute the same."""
    layers = {"trainable_layers": trainable_layers}
    models = {"model": {"path": str(folders / "actor"), **layers}, "reward_model": {"path": str(folders / "reward")}}
    models |= {"critic": layers, "reference": {"dtype": "bfloat16"}}
    models["reward_model"]["dtype"] = "bfloat16"
    engine = RLHFEngine.create(models)
    tokens, mask = batch()
    made = tiny.trainer(engine, reward=None).generate_experience(tiny.ragged_prompts(4))
    tokens, mask = np.asarray(made.tokens), np.concatenate([made.prompt_mask, made.response_mask], axis=1)
    reward = load_pretrained(folders / "reward", head="scalar")
    half = reward.model.clone(config=reward.model.config.replace(dtype="bfloat16"))
    alone = model_jit(half.apply)({"params": reward.params}, tokens, mask=mask)
    last = np.array([np.flatnonzero(row)[-1] for row in mask])
    np.testing.assert_allclose(made.scores, np.asarray(alone)[np.arange(4), last], atol=1e-3)
    half, full = RLHFEngine.create({"model": models["model"] | {"dtype": "bfloat16"}}), np.asarray(made.logprobs)
    ours, wanted = np.asarray(made.ref_logprobs), np.asarray(half.score(tokens, mask, start=5)[1])
    real = np.asarray(made.response_mask)
    np.testing.assert_allclose(ours[real], wanted[real], atol=1e-6)
    assert np.abs(ours - full)[real].max() > 1e-4  # the reference does compute in bfloat16
    values = engine.values(tokens, mask)
    whole = load_pretrained(folders / "reward", head="scalar")
    exact = jax.jit(whole.model.apply)({"params": whole.params}, tokens, mask=mask)
    np.testing.assert_allclose(np.asarray(values)[mask], np.asarray(exact)[mask], atol=1e-5)


def test_a_critic_computes_the_actors_frozen_layers_in_its_own_dtype(folders):
    layers = {"trainable_layers": 1}
    critic = layers | {"dtype": "bfloat16"}
    engine = RLHFEngine.create({"model": {"path": str(folders / "actor")} | layers, "critic": critic})
    assert engine.models.critic_shares
    made = tiny.trainer(engine).generate_experience(tiny.ragged_prompts(4))
    assert (made.frozen_activations.actor.dtype, made.frozen_activations.critic.dtype) == (jnp.float32, jnp.bfloat16)


def test_only_ids_that_all_models_have_are_sampled(tmp_path):
    """The reward model has 6 ids and the policy has 8. Responses with the other two ids would score NaN."""
    policy, reward = tiny.policy(), dataclasses.replace(tiny.policy(5, head="scalar", vocab_size=6), tokenizer=None)
    policy = dataclasses.replace(policy, tokenizer=None)
    engine = RLHFEngine(policy, reward=reward)
    prompts = tiny.ragged_prompts(64)
    prompts = dataclasses.replace(prompts, tokens=prompts.tokens % 6)
    made = tiny.trainer(engine, reward=None).generate_experience(prompts)
    assert np.asarray(made.tokens).max() == 5
    assert np.isfinite(made.scores).all()
    mask = np.concatenate([made.prompt_mask, made.response_mask], axis=1)
    logits = jax.jit(policy.model.apply)({"params": policy.params}, made.tokens, mask=mask)[:, 4:-1, :6]
    wanted = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), np.asarray(made.tokens)[:, 5:, None], axis=-1)
    real = np.asarray(made.response_mask)
    for ours in (made.logprobs, made.sampler_logprobs, made.ref_logprobs):
        np.testing.assert_allclose(np.asarray(ours)[real], wanted[..., 0][real], atol=1e-5)
    entropy = np.asarray(engine.score(made.tokens, mask, start=5)[2])
    plain = np.asarray(-jnp.sum(jax.nn.softmax(logits) * jax.nn.log_softmax(logits), axis=-1))
    np.testing.assert_allclose(entropy[real], plain[real], atol=1e-5)
    assert engine.actor.model.config.vocab_size == 8  # saved models keep all ids
    save_pretrained(tmp_path / "actor", engine.actor)
    again = load_pretrained(tmp_path / "actor")
    jax.tree.map(np.testing.assert_array_equal, again.params, jax.device_get(engine.actor.params))
    for unknown in (-1, 6):
        prompts.tokens[3, -1] = unknown
        with pytest.raises(ValueError, match=rf"prompt 3 has the token id {unknown}; .* vocabulary has 6 ids"):
            tiny.trainer(engine, reward=None).generate_experience(prompts)


@pytest.mark.parametrize("role", ["actor", "reference", "critic", "reward"])
def test_rows_that_exceed_the_positions_of_a_model_are_errors(role):
    """With 5 prompt and 6 response tokens, 11 positions are enough, and 10 are too few."""
    models = {"actor": tiny.policy(), "reference": tiny.policy(3)}
    models |= {name: tiny.policy(4, head="scalar") for name in ("critic", "reward")}
    for positions, fits in ((11, True), (10, False)):
        head = models[role].model.head
        models[role] = tiny.policy(4, head=head, position_kind="learned", rotary=None, max_positions=positions)
        trainer = tiny.trainer(RLHFEngine(models["actor"], **{k: v for k, v in models.items() if k != "actor"}))
        if fits:
            assert np.isfinite(trainer.generate_experience(tiny.ragged_prompts(4)).scores).all()
        else:
            with pytest.raises(ValueError, match=f"it runs past the {role}'s 10 positions"):
                trainer.generate_experience(tiny.ragged_prompts(4))


def test_a_float16_model_computes_in_float32_on_cpu():
    start = tiny.policy(dtype=jnp.float16)
    engine = RLHFEngine(start, reward=tiny.policy(5, head="scalar", dtype=jnp.float16))
    for role in ("actor", "reference", "critic", "reward"):
        assert getattr(engine.models, role).model.config.dtype == jnp.float32
    tokens, mask = batch()
    exact = RLHFEngine(tiny.policy()).score(tokens, mask)[0]
    np.testing.assert_array_equal(engine.score(tokens, mask)[0], exact)
