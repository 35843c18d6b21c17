"""Whether an MP3 file goes on behind the length that libsndfile takes it to have.

A file whose rate of bits varies says its length in a first frame without sound. Where that frame is
missing, as in what was written to a pipe, the length is guessed from the rate of the first bits; of
files that were joined the first one's is taken. What lies behind it would be left out in silence.
"""

_RATES = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}
_KBITS = {
    True: (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    False: (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_FIRST_VERSION = 3  # of MPEG, as a frame's head numbers it
# Frames: the one without sound, and the most that is put before and behind a sound (4,095 each).
_SLACK = 9


def goes_on(content: bytes, samples: int) -> bool:
    """Tell whether the frames of layer III at the beginning of a file hold more than `samples`.

    Where there are none, as behind bytes of another kind, nothing can be told: False.
    """
    at = found = 0
    while frame := _tag(content, at) or _frame(content, at):
        size, held = frame
        at, found = at + size, found + held
        if found > samples + _SLACK * held > 0:
            return True
    return False


def _tag(content: bytes, at: int) -> tuple[int, int] | None:
    """Return the bytes of an ID3 tag of version 2 at a place, which holds no samples."""
    head = content[at : at + 10]
    if len(head) < 10 or head[:3] != b'ID3':
        return None
    size = sum((byte & 127) << 7 * (3 - i) for i, byte in enumerate(head[6:]))
    return 10 + size + 10 * bool(head[5] & 16), 0


def _frame(content: bytes, at: int) -> tuple[int, int] | None:
    """Return the bytes and the samples of a frame at a place (ISO/IEC 11172-3, section 2.4.1.3)."""
    head = content[at : at + 4]
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE6 != 0xE2:
        return None
    version, bits, rate = head[1] >> 3 & 3, head[2] >> 4, head[2] >> 2 & 3
    if version not in _RATES or not 0 < bits < 15 or rate == 3:
        return None
    first = version == _FIRST_VERSION
    held = 1152 if first else 576
    size = held // 8 * 1000 * _KBITS[first][bits - 1] // _RATES[version][rate]
    return size + (head[2] >> 1 & 1), held
