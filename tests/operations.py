"""Metquay's operations in our own words: what each takes, answers and refuses.

Written down from the vendor's specification and from what live accounts showed, apart from the simulator's own tables,
so that each can prove the other wrong. ``*`` marks a required field, ``+`` one that only live answers have; the words
for types are those of ``MATCHES``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

_DAY = re.compile(r"(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])-\d{4}")

MATCHES = {
    "text": lambda value: isinstance(value, str),
    "yes/no": lambda value: isinstance(value, bool),
    "amount": lambda value: isinstance(value, (int, float)) and not isinstance(value, bool),
    "whole": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "day": lambda value: isinstance(value, str) and _DAY.fullmatch(value) is not None,
    "span": lambda value: value in ("DAY", "WEEK", "MONTH", "YEAR"),
    "flow": lambda value: value in ("Calibration", "Testing", "Evaluation"),
    "texts": lambda value: isinstance(value, list) and all(isinstance(text, str) for text in value),
}
"""What a value of each type looks like in an answer."""

GOOD: dict[str, Any] = {
    "text": "12",
    "yes/no": True,
    "amount": 12500.75,
    "day": "01-22-2024 10:15:00",
    "span": "MONTH",
    "flow": "Testing",
}
"""A value of each type as a request may carry it; fields that refer to something need one of their own."""

BAD: dict[str, Any] = {
    "text": 7,
    "yes/no": "yes",
    "amount": "12500.75",
    "whole": "8234",
    "day": "22.01.2024",
    "span": "FORTNIGHT",
    "flow": "Repair",
}
"""A value that is not of the type."""


@dataclass(frozen=True)
class Operation:
    """One operation. ``takes`` and ``gives`` map fields to types; ``gives`` is None where the answer has no body."""

    method: str
    path: str
    takes: dict[str, str]
    status: int
    gives: dict[str, str] | None
    refuses: frozenset[int]

    @property
    def required(self) -> set[str]:
        """The fields that a request must have."""
        return {name[:-1] for name in self.takes if name.endswith("*")}

    @property
    def fields(self) -> dict[str, str]:
        """The request's fields without their marks."""
        return {name.rstrip("*"): kind for name, kind in self.takes.items()}


def _all(kind: str, names: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), kind)


_CUSTOMER = (
    _all("text", "companyName* companyCode parentCompanyCode shortName email website phone mobile fax other")
    | _all("text", "billingAddr1 billingAddr2 billingCity billingState billingZip billingCountry")
    | _all("text", "shippingAddr1 shippingAddr2 shippingCity shippingState shippingZip shippingCountry")
    | _all("text", "billingPhone1 billingPhone2 paymentMethod taxCode workspaceCode notes customerSpecificRequirements")
    | _all("yes/no", "isInactive isTaxable activateAlerts hasBillingAddress hasShippingAddress")
    | _all("amount", "openingBalance")
)
_CUSTOMER_ANSWER = (
    _all("whole", "id")
    | {name.rstrip("*"): kind for name, kind in _CUSTOMER.items()}
    | _all("yes/no", "isPerson+")
    | _all("text", "phone2+ phone3+ billingAddr3+ billingFax+ billingEmailId+ billingLocation+ shippingAddr3+")
    | _all("text", "shippingPhone1+ shippingPhone2+ shippingFax+ shippingEmailId+ shippingLocation+")
    | _all("text", "customerSpecificRequirement+")
)
_CATEGORY = _all("text", "name* description")
_INSTRUMENT = (
    _all("text", "name* companyId* instrumentCategoryName* serialNo tagNo make model range workspaceCode")
    | _all("text", "instrumentStatus calibrationFrequency")
    | _all("span", "calibrationFrequencySpan")
    | _all("day", "lastReceivedDate lastDeliveredDate")
)
_INSTRUMENT_ANSWER = (
    _all("whole", "id")
    | _all("text", "companyName instrumentName instrumentCategory serialNo tagNo make model range workspaceCode")
    | _all("text", "barcode itemName type tolerance controlNo parentTagNo departmentName calibrationFrequency remarks")
    | _all("text", "calibrationVendor instrumentNotes calibrationStatus receivedCondition certificateUrl")
    | _all("span", "calibrationFrequencySpan")
    | _all("day", "lastReceivedDate lastDeliveredDate calibratedDate dueDate verificationDueDate auditedDate")
    | _all("yes/no", "active isCalibratedExternally isMobile isCalibrationRequired")
    | _all("amount", "calibrationCost")
    | _all("texts", "projectNames")
    | _all("text", "itemMake+ itemModel+ itemRange+ itemType+ warrantyCode+")
    | _all("day", "warrantyExpiration+ createdDate+ modifiedDate+")
)
_WORK = (
    _all("whole", "customerInstrumentId*")
    | _all("yes/no", "accreditation complianceRequired siteJob outsource")
    | _all(
        "text", "scope remarks salesOrderNo certificateAddress customerSpecificRequirements subConDetails workspaceCode"
    )
    | _all("flow", "workFlowType")
    | _all("day", "inDate deliveryDate")
)
_WORK_ANSWER = (
    _all("whole", "id revisionNo")
    | {name.rstrip("*"): kind for name, kind in _WORK.items()}
    | _all("text", "workNo customer instrumentName instrumentSerialNo instrumentTagNo instrumentBarcode jobType status")
    | _all(
        "text", "instrumentCategoryName itemDescription departmentName reportType accreditationType procedure workspace"
    )
    | _all("text", "technician certificateNo finishedBy salesPerson customerPoNo soDescription workFlowType")
    | _all("day", "workDate dueDate finishedDate recommendedDueDate calibratedDate workStartDate")
)
_READING = frozenset({400, 401, 403, 429, 500})
_CREATING = _READING | {409, 422}
_CHANGING = _CREATING | {404}


def _list(path: str, gives: dict[str, str]) -> Operation:
    return Operation("GET", path, {}, 200, gives, _READING)


def _writes(path: str, takes: dict[str, str], methods: str) -> list[Operation]:
    kinds = {
        "POST": Operation("POST", path, takes, 201, {"metquayId": "whole"}, _CREATING),
        "PUT": Operation("PUT", f"{path}/{{metquayId}}", takes, 200, None, _CHANGING),
        "DELETE": Operation("DELETE", f"{path}/{{metquayId}}", {}, 200, None, _CHANGING),
    }
    return [kinds[method] for method in methods.split()]


LOGIN = Operation(
    "POST",
    "/authenticate",
    _all("text", "accessKey* secretKey*"),
    200,
    {"accessToken": "text", "tokenType": "text", "expiresIn": "whole"},
    frozenset({400, 500}),
)

OPERATIONS = (
    LOGIN,
    _list("/customers", _CUSTOMER_ANSWER),
    *_writes("/customers", _CUSTOMER, "POST PUT DELETE"),
    *_writes("/instrument-categories", _CATEGORY, "POST PUT DELETE"),
    _list("/customer-instrument-details", _INSTRUMENT_ANSWER),
    *_writes("/customer-instrument-details", _INSTRUMENT, "POST PUT DELETE"),
    _list("/works", _WORK_ANSWER),
    *_writes("/works", _WORK, "POST PUT"),
)
"""All fifteen."""
