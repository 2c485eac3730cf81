"""Licences of the data sets: every one that is known by name has an entry, and nothing else has."""

from peerlearn.data.licences import LICENCES, UNKNOWN, licence_of
from peerlearn.data.published import DATASET_NAMES
from peerlearn.data.titles import FOLDER


def test_every_data_set_by_name_has_an_entry_and_folders_have_none():
    assert {*LICENCES, FOLDER} == {*DATASET_NAMES}
    assert licence_of(FOLDER) is licence_of("somebody's") is UNKNOWN


def test_entries_are_one_line_of_a_card():
    for name, licence in LICENCES.items():
        assert licence.words, name
        assert not licence.words.endswith("."), name
        assert "\n" not in licence.words, name
        assert licence.hub_id is None or licence.hub_id.count("/") == 1, name
