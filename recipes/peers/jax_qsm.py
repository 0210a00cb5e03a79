"""The update of Q-score matching in JAX as one jitted function, which recipes/benchmark.py compares with the kit.

It does the same work as the kit's update: TD target at a sample of the whole reverse chain, a step of two critics,
their Polyak step, dQ/da at the noised replay action, and a step of the denoiser. Needs a separate Python environment
(pip install jax optax).

python recipes/peers/jax_qsm.py --hidden 512 --steps 5 --batch 256 --seconds 5
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from itertools import pairwise

import jax
import jax.numpy as jnp
import optax

OBSERVATION, ACTION, FEATURES, TIME = 24, 6, 64, 128


def dense_layers(key, sizes):
    layers = []
    for fan_in, fan_out in pairwise(sizes):
        key, draw = jax.random.split(key)
        bound = (6 / (fan_in + fan_out)) ** 0.5
        layers.append((jax.random.uniform(draw, (fan_in, fan_out), minval=-bound, maxval=bound), jnp.zeros(fan_out)))
    return layers


def perceptron(layers, x, activation):
    for weight, bias in layers[:-1]:
        x = activation(x @ weight + bias)
    weight, bias = layers[-1]
    return x @ weight + bias


def mish(x):
    return x * jnp.tanh(jax.nn.softplus(x))


def predict_noise(actor, observation, noisy, t):
    angles = 2 * jnp.pi * t[:, None] * actor["frequencies"]
    time_embedding = perceptron(actor["time"], jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1), mish)
    return perceptron(actor["layers"], jnp.concatenate([noisy, observation, time_embedding], -1), mish)


def q_value(critic, observation, action):
    return perceptron(critic, jnp.concatenate([observation, action], -1), jax.nn.relu)[..., 0]


def make_update(steps, batch_size):
    index = jnp.arange(1, steps + 1)
    alphas = jnp.exp(-0.1 / steps - 0.5 * 9.9 * (2 * index - 1) / steps**2)
    cumprod = jnp.cumprod(alphas)
    adam = optax.adam(3e-4)

    def sample(actor, observation, key):
        key, draw = jax.random.split(key)
        x = jax.random.normal(draw, (batch_size, ACTION))
        for t in reversed(range(steps)):
            noise = predict_noise(actor, observation, x, jnp.full(batch_size, float(t)))
            x = (x - (1 - alphas[t]) / jnp.sqrt(1 - cumprod[t]) * noise) / jnp.sqrt(alphas[t])
            if t > 0:
                key, draw = jax.random.split(key)
                x = x + jnp.sqrt(1 - alphas[t]) * jax.random.normal(draw, x.shape)
            x = jnp.clip(x, -1, 1)
        return x

    @jax.jit
    def update(state, batch):
        key, *draws = jax.random.split(state["key"], 5)
        following = sample(state["actor"], batch["next_observation"], draws[0])
        following = jnp.clip(following + 0.1 * jax.random.normal(draws[1], following.shape), -1, 1)
        future = [q_value(critic, batch["next_observation"], following) for critic in state["targets"]]
        target = batch["reward"] + 0.99 * jnp.minimum(*future)

        def critic_loss(critics):
            values = [q_value(critic, batch["observation"], batch["action"]) for critic in critics]
            return sum(jnp.mean((value - target) ** 2) for value in values)

        step, critic_adam = adam.update(jax.grad(critic_loss)(state["critics"]), state["critic_adam"])
        critics = optax.apply_updates(state["critics"], step)
        targets = optax.incremental_update(critics, state["targets"], 0.005)

        t = jax.random.randint(draws[2], (batch_size,), 0, steps)
        share = cumprod[t][:, None]
        noise = jax.random.normal(draws[3], batch["action"].shape)
        noisy = jnp.sqrt(share) * batch["action"] + jnp.sqrt(1 - share) * noise
        score = jax.grad(lambda a: sum(q_value(c, batch["observation"], a).sum() for c in critics) / 2)(noisy)

        def actor_loss(actor):
            return jnp.mean((predict_noise(actor, batch["observation"], noisy, t.astype(float)) + 50 * score) ** 2)

        loss, gradient = jax.value_and_grad(actor_loss)(state["actor"])
        step, actor_adam = adam.update(gradient, state["actor_adam"])
        actor = optax.apply_updates(state["actor"], step)
        return {
            **{"actor": actor, "critics": critics, "targets": targets, "key": key},
            **{"actor_adam": actor_adam, "critic_adam": critic_adam},
        }, loss

    return update, adam


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=5.0)
    options = parser.parse_args()
    hidden = [options.hidden] * 2
    keys = jax.random.split(jax.random.PRNGKey(0), 9)
    actor = {
        "frequencies": 0.2 * jax.random.normal(keys[0], (FEATURES // 2,)),
        "time": dense_layers(keys[1], [FEATURES, TIME, TIME]),
        "layers": dense_layers(keys[2], [ACTION + OBSERVATION + TIME, *hidden, ACTION]),
    }
    critics = [dense_layers(key, [OBSERVATION + ACTION, *hidden, 1]) for key in keys[3:5]]
    update, adam = make_update(options.steps, options.batch)
    state = {
        **{"actor": actor, "critics": critics, "targets": critics, "key": keys[5]},
        **{"actor_adam": adam.init(actor), "critic_adam": adam.init(critics)},
    }
    batch = {
        "observation": jax.random.normal(keys[6], (options.batch, OBSERVATION)),
        "next_observation": jax.random.normal(keys[7], (options.batch, OBSERVATION)),
        "action": jnp.tanh(jax.random.normal(keys[8], (options.batch, ACTION))),
        "reward": jnp.ones(options.batch),
    }
    state, loss = jax.block_until_ready(update(state, batch))  # compiles
    rates, end = [], time.perf_counter() + options.seconds
    while time.perf_counter() < end:
        begin = time.perf_counter()
        for _ in range(10):
            state, loss = update(state, batch)
        jax.block_until_ready(state)
        rates.append(10 / (time.perf_counter() - begin))
    print(json.dumps({"updates_per_second": statistics.median(rates), "jax": jax.__version__, "loss": float(loss)}))


if __name__ == "__main__":
    main()
