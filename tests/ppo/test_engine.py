"""The engine: four models from checkpoints or parameters, what they share, and the functions over them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from jax_rlhf import RLHFEngine, load_pretrained, sample, save_pretrained, token_logprobs
from jax_rlhf.models import Decoder, init_params
from jax_rlhf.rollout import Sampling
from tests.ppo import tiny

pytestmark = pytest.mark.usefixtures("quick_compile")


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
    config = {"model": {"path": str(folders / "actor")}, "reward": {"path": str(folders / "reward")}, "ppo": {"any": 1}}
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
    np.testing.assert_allclose(values[:, -1], engine.reward(tokens, mask), atol=1e-5)  # the critic starts as it
    whole = jax.jit(reward.model.apply)({"params": reward.params}, tokens, mask=mask)
    np.testing.assert_allclose(np.asarray(values)[mask], np.asarray(whole)[mask], atol=1e-5)
    # What trains is held apart from what is frozen: the next update is given its buffers.
    assert not pointers(engine.trained) & pointers(engine.frozen)


def test_the_reference_is_the_actor_without_a_second_copy():
    """Parameters in memory are shared by the frozen models and copied once for those that train."""
    start = tiny.policy()
    engine = RLHFEngine(start)
    assert pointers(engine.frozen.reference) <= pointers(start.params)
    assert not pointers(engine.trained) & pointers(start.params)
    np.testing.assert_array_equal(engine.values(*batch()), 0)  # the critic's head starts at zero
    cut = RLHFEngine(start, trainable_layers=1)
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (cut.frozen.actor, cut.frozen.reference)]
    assert sum(sizes) == sum(leaf.size for leaf in jax.tree.leaves(start.params))  # bottom and top, once each


def test_reference_and_critic_of_their_own():
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
    np.testing.assert_allclose(values[mask], np.asarray(scores)[mask] + 0.3 - 0.7, atol=1e-5)  # of unfinished texts
    np.testing.assert_array_equal(starts[1].values(tokens, mask), 0)
    np.testing.assert_allclose(starts[0].reward(tokens, mask), starts[1].reward(tokens, mask), atol=1e-6)
    np.testing.assert_allclose(starts[1].reward(tokens, mask), scores[:, -1] + 0.3, atol=1e-5)


@pytest.mark.parametrize("trainable_layers", [None, 1])
def test_sampling_is_what_the_sampler_does(trainable_layers):
    start = tiny.policy()
    engine = RLHFEngine(start, trainable_layers=trainable_layers)
    tokens, mask = batch()
    key, rows = jax.random.key(2), jnp.arange(4)
    ours = engine.sample(jnp.asarray(tokens), jnp.asarray(mask), rows, key, Sampling(6, eos_ids=(2,)))
    wanted = sample(start.model, start.params, tokens, mask, key, max_new_tokens=6, eos_id=2)
    np.testing.assert_array_equal(ours.tokens, wanted.tokens)
    np.testing.assert_allclose(ours.logprobs, wanted.logprobs, atol=1e-5)


def test_a_trained_actor_is_saved_and_read_again(tmp_path, folders):
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
    assert {leaf.dtype for leaf in jax.tree.leaves(engine.trained)} == {jnp.dtype("float32")}
    trainer = tiny.trainer(engine, num_minibatches=2)
    metrics = trainer.train_rlhf(trainer.generate_experience(tiny.ragged_prompts(8)))
    assert metrics["val/first_ratio_gap"] < 0.1
    assert metrics["val/sampler_logprob_gap"] < 0.2
    assert metrics["objective/kl"] == 0
    assert metrics["val/skipped_updates"] == 0


def test_bad_configs_and_models_that_do_not_fit_are_named(folders, tmp_path):
    path = str(folders / "actor")
    for config, message in [
        ({}, r"config\.model\.path is not set"),
        ({"model": {"paht": path}}, r"config\.model\.paht: there is no such field; did you mean path"),
        ({"model": {"path": path, "trainable_layers": 3}}, "trainable_layers=3 must lie within 1 and the model's 2"),
        ({"model": {"path": path}, "reward": {"path": path, "trainable_layers": 1}}, "reference and reward model are"),
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
    other = tiny.policy(5, head="scalar")
    other.tokenizer.add_tokens(["w9"])
    with pytest.raises(ValueError, match="reward has another tokenizer than the actor"):
        RLHFEngine(tiny.policy(), reward=other)
    small = dataclasses.replace(tiny.policy(5, head="scalar", vocab_size=7), tokenizer=None)
    with pytest.raises(ValueError, match="critic knows 7 tokens, the tokenizer has 8"):
        RLHFEngine(tiny.policy(), critic=small)
    with pytest.raises(ValueError, match=r"config\.reward\.path"):
        RLHFEngine(tiny.policy()).reward(*batch())


def test_models_are_cut_over_a_mesh():
    mesh = Mesh(np.array(jax.devices()).reshape(1, 2, 4), ("data", "fsdp", "tensor"))
    one, eight = RLHFEngine(tiny.policy()), RLHFEngine(tiny.policy(), mesh=mesh)
    kernel = eight.trained.actor["layers"]["mlp"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.size * 8 == kernel.size
    tokens, mask = batch()
    for first, second in zip(one.score(tokens, mask), eight.score(tokens, mask), strict=True):
        np.testing.assert_allclose(np.asarray(first)[mask[:, 1:]], np.asarray(second)[mask[:, 1:]], atol=1e-5)


def test_untied_heads_follow_their_part():
    model = Decoder(dataclasses.replace(tiny.policy().model.config, tie_embeddings=True))
    start = dataclasses.replace(tiny.policy(), model=model, params=init_params(model, jax.random.key(0)))
    engine = RLHFEngine(start, trainable_layers=1)
    assert "embedding" not in engine.trained.actor
    assert "lm_head" not in engine.trained.actor
    untied = RLHFEngine(tiny.policy(tie_embeddings=False), trainable_layers=1)
    assert "lm_head" in untied.trained.actor
