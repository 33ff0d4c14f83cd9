"""This module defines which datasets count as neighbours."""

from __future__ import annotations

from enum import Enum

from clipgrad import _validate


class Relation(Enum):
    """This enum names the neighbouring relations.

    ==================  ======================================  =================
    relation            one dataset becomes the other by        sensitivity (C=1)
    ==================  ======================================  =================
    ADD_OR_REMOVE_ONE   adding or removing one sample           1
    REPLACE_ONE         replacing one sample by any other       2
    REPLACE_SPECIAL     replacing one sample by a null sample   1
    ==================  ======================================  =================

    The names follow Google's ``dp_accounting.NeighboringRelation``. A null sample, such as padding, contributes
    nothing.
    """

    ADD_OR_REMOVE_ONE = "add_or_remove_one"
    REPLACE_ONE = "replace_one"
    REPLACE_SPECIAL = "replace_special"


def relation_of(relation: Relation | str) -> Relation:
    """Return a relation by member or by name.

    Raises:
        ValueError: If no relation has that name.
    """
    name = relation.value if isinstance(relation, Relation) else str(relation).lower()
    return Relation(_validate.one_of("relation", name, [member.value for member in Relation]))


def most_contributions(relation: Relation) -> int:
    """Return the distance of neighbouring sums in units of one sample's largest contribution."""
    return 2 if relation is Relation.REPLACE_ONE else 1
