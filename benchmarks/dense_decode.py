"""Dense float32 decoding of a random GPT-2-124M shape against transformers on torch, in one run.

    python -m benchmarks.dense_decode            # adds to benchmarks/results/speed_gpt2-124m.json
    python -m benchmarks.dense_decode --quick    # two rounds of 16 steps, nothing written

The short form of `benchmarks.speed decode`, with transformers as the only peer.
"""

import sys

from benchmarks import speed

ARGUMENTS = ("decode", "--model", "gpt2-124m", "--batch", "1", "2", "8", "--bits", "--peers", "transformers float32")

if __name__ == "__main__":
    speed.main([*ARGUMENTS, *sys.argv[1:]])
