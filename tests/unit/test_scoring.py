"""What is compared of two distributions, against its definition."""

import numpy as np

from qs_jax.evaluation.scoring import _compare


def test_kl_and_agreement_match_their_definitions() -> None:
    p, q = np.random.default_rng(0).normal(size=(2, 3, 4, 11)).astype(np.float32)
    kl, agrees = _compare(p, q)
    probabilities = np.exp(p) / np.exp(p).sum(-1, keepdims=True)
    others = np.exp(q) / np.exp(q).sum(-1, keepdims=True)
    np.testing.assert_allclose(kl, (probabilities * np.log(probabilities / others)).sum(-1), atol=1e-5)
    np.testing.assert_array_equal(agrees, p.argmax(-1) == q.argmax(-1))
    assert np.abs(np.asarray(_compare(p, p)[0])).max() < 1e-6
