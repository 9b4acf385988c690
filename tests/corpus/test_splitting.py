import hashlib

from hypothesis import given
from hypothesis import strategies as st

from gptcore.config import SplitConfig
from gptcore.corpus import split_of


def test_the_shares_hold_over_many_groups():
    split = SplitConfig(valid=0.1, test=0.2)
    dealt = [split_of(f"group {number}", split) for number in range(20_000)]
    assert abs(dealt.count("valid") / 20_000 - 0.1) < 0.01
    assert abs(dealt.count("test") / 20_000 - 0.2) < 0.01


@given(st.text(), st.integers())
def test_a_group_has_one_place_that_only_its_name_and_the_seed_decide(group, seed):
    split = SplitConfig(seed=seed, valid=0.3, test=0.3)
    digest = hashlib.sha256(f"{seed}:{group}".encode()).hexdigest()
    place = int(digest[:16], 16) / 16**16
    assert split_of(group, split) == ("test" if place < 0.3 else "valid" if place < 0.6 else "train")


def test_raising_valid_takes_nothing_away_from_test():
    groups = [f"group {number}" for number in range(2000)]
    small, large = SplitConfig(valid=0.05, test=0.1), SplitConfig(valid=0.3, test=0.1)
    assert {g for g in groups if split_of(g, small) == "test"} == {g for g in groups if split_of(g, large) == "test"}


def test_another_seed_deals_anew():
    groups = [f"group {number}" for number in range(200)]
    assert [split_of(g, SplitConfig(seed=1, test=0.4)) for g in groups] != [
        split_of(g, SplitConfig(seed=2, test=0.4)) for g in groups
    ]
