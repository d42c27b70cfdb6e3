"""Any users with their items, for property tests; only these need hypothesis."""

from hypothesis import strategies as st

# Lists of items, one per user. The last user makes a holdout possible and has items of their own.
ANY_USERS = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=12), max_size=6).map(
    lambda users: [*users, [10, 11, 10, 11, 12]]
)
