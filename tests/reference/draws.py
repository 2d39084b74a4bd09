"""The draws of random methods, written down a second time: one word of 32 bits at a time, in whole numbers.

The key of a model is the blake2b digest (8 bytes) of "seed NUL tensor NUL position": two little-endian words k0, k1. The
word of element e is mix((mix(low(e) ^ k0) + k1) ^ (high(e) * 0x7FEB352D)), all modulo 2^32, mix being the "lowbias32"
finalizer of C. Wellons, "Prospecting for hash functions" (2018). The draw is its upper 24 bits over 2^24.
"""

import hashlib

import numpy as np

FIRST, SECOND = np.uint64(0x7FEB352D), np.uint64(0x846CA68B)
WORD = np.uint64(0xFFFFFFFF)


def mix(word):
    word = word ^ (word >> np.uint64(16))
    word = (word * FIRST) & WORD
    word = word ^ (word >> np.uint64(15))
    word = (word * SECOND) & WORD
    return word ^ (word >> np.uint64(16))


def draws(seed, tensor, model, size, offset=0):
    digest = hashlib.blake2b(f"{seed}\0{tensor}\0{model}".encode(), digest_size=8).digest()
    k0, k1 = np.frombuffer(digest, dtype="<u4").astype(np.uint64)
    element = np.arange(size, dtype=np.uint64) + np.uint64(offset)
    low, high = element & WORD, element >> np.uint64(32)
    word = mix((mix(low ^ k0) + k1) & WORD ^ ((high * FIRST) & WORD))
    return (word >> np.uint64(8)).astype(np.float64) / 2**24
