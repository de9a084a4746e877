"""A simple implementation of a PPO iteration: full logits, no scans, chunks or microbatches, float64 outside models."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jax_rlhf.sampling.draw import draw_tokens
from tests.rl import oracle as rl

ORDER = 0xFFFFFFFF  # folded into the key for shuffling; row ids are smaller


# ---- models --------------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def logits_of(model, params, tokens, mask):
    return model.apply({"params": params}, tokens, mask=mask)


def policy(model, params, tokens, mask, start, temperature):
    """(log-probs, entropy) of tokens[:, start:], float32[B, T − start]."""
    logp = jax.nn.log_softmax(logits_of(model, params, tokens, mask)[:, start - 1 : -1] / temperature)
    chosen = jnp.take_along_axis(logp, jnp.asarray(tokens)[:, start:, None], axis=-1)[..., 0]
    return chosen, -jnp.sum(jnp.exp(logp) * logp, axis=-1)


# ---- the first program: the experience -----------------------------------------------------------------------------


def sampled(model, params, prompts, config, iteration):
    """(tokens, response mask, log-probs, kept mass), with a forward pass over the whole rows per token."""
    rows, width = prompts.tokens.shape
    tokens = np.concatenate(
        [prompts.tokens, np.full((rows, config.sampling.max_new_tokens), config.sampling.pad_id)], axis=1
    )
    mask = np.concatenate([prompts.mask, np.zeros((rows, config.sampling.max_new_tokens), bool)], axis=1)
    (logprobs, kept), running = np.zeros((2, rows, config.sampling.max_new_tokens)), np.ones(rows, bool)
    key = jax.random.fold_in(jax.random.key(config.seed), iteration)

    @jax.jit
    def drawn(tokens, mask, index, ban):
        logits = (
            jnp.take(logits_of(model, params, tokens, mask), width + index - 1, axis=1) / config.sampling.temperature
        )
        keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.fold_in(key, row), index))(prompts.row_ids)
        options = {
            "top_k": config.sampling.top_k,
            "top_p": config.sampling.top_p,
            "banned": config.sampling.eos_ids,
            "ban": ban,
        }
        return draw_tokens(logits, keys, **options)

    for index in range(config.sampling.max_new_tokens):
        draw = jax.device_get(drawn(tokens, mask, index, index < config.sampling.min_new_tokens))
        tokens[running, width + index], logprobs[running, index] = draw.tokens[running], draw.logprobs[running]
        kept[running, index] = draw.kept_mass[running]
        mask[running, width + index] = True
        running &= ~np.isin(tokens[:, width + index], config.sampling.eos_ids)
    return tokens, mask[:, width:], logprobs, kept


def collected(models, made, config, kl_coef):
    """The other arrays of an experience, from its tokens. models: role → (model, params), and "biases" → a dict."""
    tokens, response = np.asarray(made.tokens), np.asarray(made.response_mask)
    start = made.prompt_mask.shape[1]
    mask = np.concatenate([made.prompt_mask, response], axis=1)
    exact = lambda x: np.asarray(x, np.float64)  # noqa: E731
    logprobs, ref_logprobs = (
        np.where(response, exact(policy(*models[role], tokens, mask, start, config.sampling.temperature)[0]), 0)
        for role in ("actor", "reference")
    )
    biases = models["biases"]
    states = exact(logits_of(*models["critic"], tokens, mask)) + biases["critic"]
    last = np.array([np.flatnonzero(row)[-1] for row in mask])
    ended = np.isin(tokens[np.arange(len(tokens)), last], config.sampling.eos_ids)
    scores = exact(logits_of(*models["reward"], tokens, mask))[np.arange(len(tokens)), last] + biases["reward"]
    scores = scores - biases["missing_eos"] * ~ended
    values, rewards = np.where(response, states[:, start - 1 : -1], 0), np.zeros(response.shape)
    advantages, returns = np.zeros((2, *response.shape))
    for row, length in enumerate(response.sum(axis=1)):
        k1 = logprobs[row] - ref_logprobs[row]
        kl = {"k1": k1, "k2": k1**2 / 2, "k3": np.exp(-k1) - 1 + k1, "abs": np.abs(k1)}[config.kl.kind]
        rewards[row] = np.where(response[row], -kl_coef * kl / (length if config.kl.reduction == "mean" else 1), 0)
        clip = np.inf if config.reward.clip is None else config.reward.clip
        rewards[row, length - 1] += np.clip(scores[row], -clip, clip) - config.reward.missing_eos_penalty * (
            not ended[row]
        )
    if config.reward.whiten:
        rewards = np.where(response, rl.whiten(rewards, response, shift_mean=False), 0)
    for row in range(len(tokens)):
        bootstrap = states[row, -1] if config.reward.truncation == "bootstrap" and not ended[row] else 0.0
        advantages[row], returns[row] = rl.gae(
            rewards[row], values[row], response[row], config.gamma, config.lam, bootstrap
        )
    if config.whiten_advantages:
        advantages = rl.whiten(advantages, response)
    names = "logprobs", "ref_logprobs", "values", "rewards", "advantages", "returns", "scores", "ended"
    return dict(zip(names, (logprobs, ref_logprobs, values, rewards, advantages, returns, scores, ended), strict=True))


def experience_metrics(config, made, kl_coef):
    """The metrics of `ppo/metrics.py`, from the arrays of an experience, in float64."""
    mask = np.asarray(made.response_mask)
    get = lambda name: np.asarray(getattr(made, name), np.float64)  # noqa: E731
    ratio, returns, values = get("logprobs") - get("ref_logprobs"), get("returns")[mask], get("values")[mask]
    penalties, optimised = [], []
    for row, length in enumerate(mask.sum(axis=1)):
        k1 = ratio[row, :length]
        kl = {"k1": k1, "k2": k1**2 / 2, "k3": np.exp(-k1) - 1 + k1, "abs": np.abs(k1)}[config.kl.kind]
        penalties.append(-kl_coef * (kl.mean() if config.kl.reduction == "mean" else kl.sum()))
        clip = np.inf if config.reward.clip is None else config.reward.clip
        score = np.clip(get("scores")[row], -clip, clip)
        optimised.append(score - config.reward.missing_eos_penalty * (not made.ended[row]) + penalties[-1])
    kl, scores, ended = ratio.sum(axis=1).mean(), get("scores"), get("ended")
    return {
        "objective/kl": kl,
        "objective/kl_per_token": ratio[mask].mean(),
        "objective/entropy": -get("logprobs").sum(axis=1).mean(),
        "objective/scores": scores.mean(),
        "objective/scores_std": scores.std(),
        "objective/non_score_reward": np.mean(penalties),
        "objective/rlhf_reward": np.mean(optimised),
        "objective/kl_coef": kl_coef,
        "objective/response_length": mask.sum(axis=1).mean(),
        "objective/eos_rate": ended.mean(),
        "val/num_eos_tokens": ended.sum(),
        "val/explained_variance": 1 - np.var(returns - values) / np.var(returns),
        "val/sampler_logprob_gap": np.abs(get("logprobs") - get("sampler_logprobs"))[mask].max(),
        "val/kept_mass": get("kept_mass")[mask].mean(),
        "val/bad_scores": 0.0,
    }


# ---- the second program: the updates -------------------------------------------------------------------------------


class Adam:
    """Adam with gradient clipping and weight decay over the leaves of a tree, in float64."""

    def __init__(self, config, params):
        self.config, self.count = config, 0
        self.m = jax.tree.map(lambda leaf: np.zeros(leaf.shape), params)
        self.v = jax.tree.map(lambda leaf: np.zeros(leaf.shape), params)

    def step(self, params, gradient, rate):
        c, self.count = self.config, self.count + 1
        norm = np.sqrt(sum(np.sum(leaf**2) for leaf in jax.tree.leaves(gradient)))
        if c.max_grad_norm is not None and norm > c.max_grad_norm:
            gradient = jax.tree.map(lambda leaf: leaf * c.max_grad_norm / norm, gradient)
        self.m = jax.tree.map(lambda m, g: c.beta1 * m + (1 - c.beta1) * g, self.m, gradient)
        self.v = jax.tree.map(lambda v, g: c.beta2 * v + (1 - c.beta2) * g * g, self.v, gradient)
        first, second = 1 - c.beta1**self.count, 1 - c.beta2**self.count

        def new(path, p, m, v):
            eps = c.eps if c.eps_form == "pytorch" else c.eps / np.sqrt(second)
            decay = 0 if path[-1].key in ("scale", "bias") else c.weight_decay
            return p - rate * (m / first / (np.sqrt(v / second) + eps) + decay * p)

        return jax.tree_util.tree_map_with_path(new, params, self.m, self.v), norm


def rate(config, step):
    """The learning rate: a linear warm-up, then a linear decay to a fraction."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = min((step - config.warmup_steps) / (config.total_steps - config.warmup_steps), 1)
    return config.learning_rate * (1 + (config.final_fraction - 1) * done)


def surrogate(config, ratio, advantages, penalty):
    """(loss, whether it is clipped) per token."""
    if config.loss.policy == "penalty":
        return -advantages * ratio + penalty * (ratio - 1 - jnp.log(ratio)), jnp.zeros(ratio.shape, bool)
    low, high = 1 - config.loss.clip_range, 1 + (config.loss.clip_range_high or config.loss.clip_range)
    loss = jnp.maximum(-advantages * ratio, -advantages * jnp.clip(ratio, low, high))
    if config.loss.dual_clip is not None:
        loss = jnp.where(advantages < 0, jnp.minimum(loss, -config.loss.dual_clip * advantages), loss)
    return loss, jnp.where(advantages < 0, ratio < low, (ratio > high) & (advantages > 0))


def update(networks, frozen, trained, config, made, *, text, state):
    """The updates of an iteration → (actor, critic, metrics, new state).

    networks: (actor, critic) as functions of their trainable parameters: tree → (model, whole parameters).
    text: rows for PPO-ptx, or None.
    state: iteration, per_iteration (optimizer steps), entropy, penalty.
    """
    made = jax.tree.map(jnp.asarray, made)
    rows, start = len(made.tokens), made.prompt_mask.shape[1]
    full = jnp.concatenate([made.prompt_mask, made.response_mask], axis=1)
    text = None if text is None else jax.tree.map(jnp.asarray, text)
    params = [jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree) for tree in trained]
    adams = [Adam(config.actor.optimizer, params[0]), Adam(config.critic.optimizer, params[1])]
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), state["iteration"]), ORDER)
    measured, entropy, index = [], state["entropy"], 0

    def mean(x, picked):
        return jnp.sum(jnp.where(made.response_mask[picked], x, 0)) / made.response_mask[picked].sum()

    def actor_loss(actor, picked, texts, coefficient):
        logprobs, entropies = policy(
            *networks[0](actor), made.tokens[picked], full[picked], start, config.sampling.temperature
        )
        ratio = jnp.where(made.response_mask[picked], jnp.exp(logprobs - made.logprobs[picked]), 1)
        loss, clipped = surrogate(config, ratio, made.advantages[picked], state["penalty"])
        found = {
            "loss/policy_avg": mean(loss, picked),
            "policy/entropy_avg": mean(entropies, picked),
            "policy/approxkl_avg": mean(jnp.log(ratio) ** 2 / 2, picked),
            "policy/penalty_kl": mean(ratio - 1 - jnp.log(ratio), picked),
            "policy/clipfrac_avg": mean(clipped, picked),
            "val/ratio": mean(ratio, picked),
            "gap": jnp.max(jnp.abs(ratio - 1)),
            "loss/ptx_avg": 0.0,
        }
        total = found["loss/policy_avg"] - coefficient * found["policy/entropy_avg"]
        if text is not None:
            counted = text.mask[texts][:, 1:] & text.mask[texts][:, :-1]
            chosen, _ = policy(*networks[0](actor), text.tokens[texts], text.mask[texts], 1, 1.0)
            found["loss/ptx_avg"] = -jnp.sum(jnp.where(counted, chosen, 0)) / counted.sum()
            total = total + config.loss.ptx_coef * found["loss/ptx_avg"]
        return total, found

    def critic_loss(critic, picked):
        values = logits_of(*networks[1](critic), made.tokens[picked], full[picked])[:, start - 1 : -1]
        values = values + frozen.critic_bias
        plain = (values - made.returns[picked]) ** 2
        near = jnp.clip(values - made.values[picked], -config.loss.value_clip_range, config.loss.value_clip_range)
        held = (made.values[picked] + near - made.returns[picked]) ** 2
        loss = mean(jnp.maximum(plain, held) / 2, picked)
        return loss, {"loss/value_avg": loss, "val/clipfrac_avg": mean(held > plain, picked)}

    gradients = [jax.jit(jax.grad(loss, has_aux=True)) for loss in (actor_loss, critic_loss)]
    for epoch in range(config.ppo_epochs):
        order = np.asarray(jax.random.permutation(jax.random.fold_in(key, epoch), rows))
        for number, picked in enumerate(np.split(order, config.num_minibatches)):
            texts = None if text is None else np.split(np.arange(len(text.tokens)), config.num_minibatches)[number]
            high = config.loss.entropy_target is not None and entropy >= config.loss.entropy_target
            single = [jax.tree.map(jnp.float32, tree) for tree in params]
            actor, found = gradients[0](single[0], picked, texts, 0.0 if high else config.loss.entropy_coef)
            critic, more = gradients[1](single[1], picked)
            entropy, found = float(found["policy/entropy_avg"]), found | more
            for each, (gradient, name) in enumerate(((actor, "lr"), (critic, "lr_critic"))):
                learning_rate = rate(adams[each].config, state["iteration"] * state["per_iteration"] + index)
                exact = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), gradient)
                params[each], norm = adams[each].step(params[each], exact, learning_rate)
                found[name], found[("policy", "val")[each] + "/grad_norm"] = learning_rate, norm
            measured.append({name: float(value) for name, value in found.items()})
            index += 1
    metrics = {name: np.mean([each[name] for each in measured]) for name in measured[0]}
    metrics |= {name: measured[-1][name] for name in ("lr", "lr_critic")}
    gaps = [each["gap"] for each in measured]
    metrics |= {"val/first_ratio_gap": gaps[0], "val/last_ratio_gap": gaps[-1], "val/largest_ratio_gap": max(gaps)}
    metrics["val/ratio_var"] = np.var([each["val/ratio"] for each in measured])
    del metrics["gap"]
    after = state | {"entropy": entropy}
    if config.loss.policy == "penalty":
        _, found = gradients[0](jax.tree.map(jnp.float32, params[0]), picked, texts, 0.0)
        after["penalty_kl"] = float(found["policy/penalty_kl"])
    return *params, metrics, after
