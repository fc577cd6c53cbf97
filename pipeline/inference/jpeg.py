"""Take the pixels out of a JPEG, so that its structure can be judged without decoding them."""

import re

_START_OF_IMAGE = b"\xff\xd8"
_END_OF_IMAGE = 0xD9
_START_OF_SCAN = 0xDA
# Baseline, extended and progressive frames, all Huffman-coded (ITU-T T.81, table B.1); what libjpeg does with the
# others (lossless, arithmetic) is left to it.
_FRAMES = (0xC0, 0xC1, 0xC2)
# Segments with a length: Huffman tables, quantisation tables, restart interval, applications' own, comment.
_SEGMENTS = (*_FRAMES, 0xC4, _START_OF_SCAN, 0xDB, 0xDD, *range(0xE0, 0xF0), 0xFE)
# In entropy-coded bytes FF is followed by 00, by a restart marker or by more FF; anything else ends them.
_MARKER = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])")


def strip_scans(data: bytes) -> bytes | None:
    """Return a JPEG's markers and segments to its end, without the entropy-coded bytes between them.

    libjpeg refuses the result exactly where it refuses the whole. Entropy-coded bytes cannot fail: bad codes are
    warnings, and its decoder never reads past a marker (jdhuff.c, jdphuff.c); a marker of C0 or higher stands there
    until the scan is full (jdmarker.c, jpeg_resync_to_restart). What is fatal stands in the segments, which are kept,
    or is the missing end. None for a file whose end is missing, or with anything unusual between its segments.
    """
    if data[:2] != _START_OF_IMAGE:
        return None
    kept, position = [_START_OF_IMAGE], 2
    while data[position : position + 1] == b"\xff" and position + 1 < len(data):
        marker = data[position + 1]
        if marker == _END_OF_IMAGE:
            return b"".join([*kept, b"\xff\xd9"])
        if marker not in _SEGMENTS:
            return None
        end = position + 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        kept.append(data[position:end])
        if marker == _START_OF_SCAN:
            found = _MARKER.search(data, end)
            if found is None or found[1] < b"\xc0":  # libjpeg passes over those inside a scan, not behind it
                return None
            end = found.start()
        position = end
    return None
