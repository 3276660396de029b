from safetynet.text.printable import printable


def test_printable_text_is_left_alone_and_nothing_else():
    assert printable("naïve 小鱼 שלום 🦜 a\\b") == "naïve 小鱼 שלום 🦜 a\\b"
    assert printable("a\nb\x1b\u202e\ud800") == "a\\nb\\x1b\\u202e\\ud800"
    assert printable("a\nb\tc", lines=True) == "a\nb\\tc"
