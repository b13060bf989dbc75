"""Fail when a test was skipped for want of one of the named programs: no_skips.py junit.xml chromium ffmpeg ..."""
import sys
import xml.etree.ElementTree as ET


def skipped_for(path, words):
    "Names and reasons of the skipped tests whose reason mentions one of the words."
    found = []
    for case in ET.parse(path).iter("testcase"):
        for skip in case.iter("skipped"):
            reason = skip.get("message", "")
            if any(word in reason.lower() for word in words):
                found.append(f"{case.get('classname')}::{case.get('name')}: {reason}")
    return found


if __name__ == "__main__":
    lines = skipped_for(sys.argv[1], [w.lower() for w in sys.argv[2:]])
    print("\n".join(lines))
    if lines: sys.exit(f"{len(lines)} tests were skipped although what they need should be installed.")
