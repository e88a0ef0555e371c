"""Chunked cross-entropy: the values and gradients of the plain one, without its memory."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mamba3_jax.training.loss import cross_entropy

B, T, D, V, PADDED = 3, 21, 8, 37, 48


def inputs():
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (B, T, D))
    head = jax.random.normal(keys[1], (PADDED, D))
    targets = jax.random.randint(keys[2], (B, T), 0, V)
    return x, head, targets, jax.random.bernoulli(keys[3], 0.7, (B, T))


def chunked(x, head, targets, mask, chunk):
    return cross_entropy(lambda x: jnp.einsum("btd,vd->btv", x, head), x, targets, mask, vocab_size=V, chunk=chunk)


def plain(x, head, targets, mask):
    """(nll, z) from all logits at once."""
    logits = jnp.einsum("btd,vd->btv", x, head)[..., :V]
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    z = jax.nn.logsumexp(logits, axis=-1) ** 2
    return jnp.sum(nll * mask), jnp.sum(z * mask)


@pytest.mark.parametrize("chunk", [1, 4, 7, 20, 21, 1000])
def test_any_chunk_gives_the_sums_and_gradients_of_all_logits_at_once(chunk):
    """Also where the chunk does not divide the row; the entries that pad the vocabulary are no tokens."""
    x, head, targets, mask = inputs()

    def total(loss):
        nll, z = loss
        return nll + 0.1 * z

    value, gradient = jax.value_and_grad(
        lambda x, head: total(chunked(x, head, targets, mask, chunk)[:2]), argnums=(0, 1)
    )(x, head)
    expected, expected_gradient = jax.value_and_grad(
        lambda x, head: total(plain(x, head, targets, mask)), argnums=(0, 1)
    )(x, head)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert chunked(x, head, targets, mask, chunk).count == mask.sum()
    for got, want in zip(gradient, expected_gradient):
        np.testing.assert_allclose(got, want, atol=1e-4)


def test_what_is_masked_has_no_influence():
    """Whatever the target there is, and whatever the model says there."""
    x, head, targets, mask = inputs()
    other = jnp.where(mask, targets, 10**6)
    wild = jnp.where(mask[..., None], x, 1e4)
    expected = chunked(x, head, targets, mask, 5)
    got, gradient = jax.value_and_grad(lambda x: chunked(x, head, other, mask, 5).nll)(wild)
    np.testing.assert_array_equal(got, expected.nll)
    assert not np.any(np.where(mask[..., None], 0, gradient))
    assert chunked(x, head, targets, jnp.zeros_like(mask), 5).nll == 0


def test_logits_of_all_tokens_never_exist():
    """No array of the compiled gradient has as many numbers, and its memory is that of a chunk."""
    b, t, d, v, chunk = 2, 512, 16, 8192, 16
    x, head = jnp.ones((b, t, d)), jnp.ones((v, d))
    targets, mask = jnp.zeros((b, t), jnp.int32), jnp.ones((b, t), bool)

    def loss(x, head):
        logits = lambda x: jnp.einsum("btd,vd->btv", x, head)  # noqa: E731
        return cross_entropy(logits, x, targets, mask, vocab_size=v, chunk=chunk).nll

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(x, head).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * b * t * v / 4


def test_no_array_of_a_chunks_logits_is_kept_outside_the_loop():
    """As JAX keeps what does not depend on the loop's piece, a mask of the padding, say."""
    x, head, targets, mask = inputs()
    loss = jax.grad(lambda x, head: chunked(x, head, targets, mask, 7).nll, argnums=(0, 1))
    outside = [out.aval.size for equation in jax.make_jaxpr(loss)(x, head).eqns for out in equation.outvars]
    assert max(outside) < B * 7 * PADDED
