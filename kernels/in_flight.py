"""Bytes that a multiprocessor has in flight, counted in machine code.

A thread waits at the first use of a register that is being loaded. The bytes of all loads that it has issued by then
are in flight. As many threads as fit a multiprocessor do the same.
"""

import re

THREADS = 256
REGISTERS = 65536  # per multiprocessor, on every architecture of check_sass.py
MOST_THREADS = {75: 1024, 80: 2048, 90: 2048, 100: 2048, 120: 1536}


def blocks(registers, arch):
    """Returns the blocks of 256 threads that fit a multiprocessor. Registers are allocated 8 at a time."""
    each = -(-registers // 8) * 8
    return min(REGISTERS // (each * THREADS), MOST_THREADS[arch] // THREADS)


def batches(piece):
    """Returns the bytes in flight of one thread at each wait, in a piece of code without a jump."""
    waiting, found, is_new = [], [], False
    for opcode, operands in piece:
        parts = opcode.split(".")
        named = [int(number) for number in re.findall(r"\bR(\d+)\b", operands)]
        loads = parts[0] == "LDG"
        used = named[1:] if loads else named
        ready = [i for i, (first, end) in enumerate(waiting) if any(first <= number < end for number in used)]
        if ready:
            if is_new:
                found.append(sum(4 * (end - first) for first, end in waiting))
            is_new = False
            # Loads arrive in their order.
            waiting = waiting[max(ready) + 1 :]
        if loads:
            words = 4 if "128" in parts else 2 if "64" in parts else 1
            waiting.append((named[0], named[0] + words))
            is_new = True
    return found


def per_multiprocessor(loops, times, registers, arch):
    """Returns the KB in flight at the wait with the fewest, in the `times` best of some loops."""
    least = sorted((min(batches(loop), default=0) for loop in loops), reverse=True)
    return least[times - 1] * THREADS * blocks(registers, arch) // 1024 if len(least) >= times else 0
