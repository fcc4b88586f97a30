"""The page at `/`: one file, whose own style and script are all that its content security policy lets run."""

import base64
import hashlib
import re
from importlib.resources import files

HTML = (files("qs_jax.serving") / "page.html").read_text("utf-8")


def _hashes(element: str) -> str:
    """Of what stands in every element of that name, as the policy lists them."""
    texts = re.findall(rf"<{element}>(.*?)</{element}>", HTML, re.DOTALL)
    digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts)
    return " ".join(f"'sha256-{digest}'" for digest in digests)


POLICY = "; ".join(
    (
        "default-src 'none'",
        f"script-src {_hashes('script')}",
        f"style-src {_hashes('style')}",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
"""No other resource is loaded, nothing inline but these runs, and no other page may frame it."""
