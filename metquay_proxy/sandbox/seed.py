"""The sandbox's first records: a calibration laboratory that looks alive, or those of a JSON file.

Owns the made-up customers, instruments and works, and the shape of a seed file. Must not know HTTP, and must not write
records past the rules: both ways go through ``Records.load``. The same day gives the same records, so that a test, a
colleague and tomorrow's bug report see one laboratory; dates lie around that day, so that due dates stay believable.
Where more records are wanted than the laboratory has, the further ones are variants of these with awkward texts.

Facts: the vendor's examples name customer 10427 (code MCS-001), instrument 8234 and work 21568: they exist here too.

A seed file is one JSON object with any of the lists ``customers``, ``categories``, ``instruments`` and ``works``. Their
entries hold the fields of a request, and may hold ``id`` and those of an answer (``calibratedDate``, ``status``...):

    {"customers": [{"companyName": "Acme", "companyCode": "ACM"}],
     "categories": [{"name": "Caliper"}],
     "instruments": [{"id": 1, "name": "Caliper 150 mm", "companyId": "ACM", "instrumentCategoryName": "Caliper",
                      "calibratedDate": "01-22-2024", "calibrationFrequency": "1", "calibrationFrequencySpan": "YEAR"}],
     "works": [{"customerInstrumentId": 1, "status": "Finished"}]}
"""

from __future__ import annotations

import json
import random
from datetime import date, timedelta
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from metquay_proxy.sandbox.records import (
    CATEGORIES,
    CUSTOMERS,
    INSTRUMENTS,
    WORKS,
    Records,
    Refusal,
    date_text,
    due_date,
    local_day,
)

if TYPE_CHECKING:
    from os import PathLike

LISTS: Final = {"customers": CUSTOMERS, "categories": CATEGORIES, "instruments": INSTRUMENTS, "works": WORKS}
"""The lists of a seed file, in the order in which they refer to each other."""


class SeedError(ValueError):
    """A seed file that cannot be used; the text is one line and names the file and the entry."""


def load_seed(path: str | PathLike[str]) -> Records:
    """Read records from a JSON file. Raises ``SeedError``, also when the file cannot be read."""
    records = Records()
    try:
        lists = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not JSON in UTF-8: {error}"
        raise SeedError(f"{path}: {reason}") from error
    if not isinstance(lists, dict) or not all(isinstance(lists.get(name, []), list) for name in LISTS):
        raise SeedError(f"{path}: must be one JSON object with lists named {', '.join(LISTS)}")
    if unknown := next((name for name in lists if name not in LISTS), None):
        raise SeedError(f"{path}: there is no list {unknown!r}; the lists are {', '.join(LISTS)}")
    for name, kind in LISTS.items():
        for index, entry in enumerate(lists.get(name, [])):
            try:
                records.load(kind, entry)
            except Refusal as refusal:
                raise SeedError(f"{path}: {name}[{index}]: {refusal.detail}") from refusal
    return records


def sample_records(today: date | None = None, number: int | None = None) -> Records:
    """Make the laboratory as it is on ``today`` (default: the machine's local day, which then moves on by itself).

    With a ``number`` there are so many customers, instruments and works. Where the laboratory has more, its first
    customers are kept, of their instruments the first, and of the works on these; where it has fewer, variants follow.
    """
    records = _sample(today or local_day(), number).copy(local_day if today is None else lambda: today)
    if number:
        records.fill(number, _variant)
    return records


@lru_cache(maxsize=4)
def _sample(today: date, number: int | None) -> Records:
    records = Records(lambda: today)
    laboratory = _laboratory(today)
    laboratory[CUSTOMERS] = laboratory[CUSTOMERS][:number]
    codes = {customer["companyCode"] for customer in laboratory[CUSTOMERS]}
    laboratory[INSTRUMENTS] = [row for row in laboratory[INSTRUMENTS] if row["companyId"] in codes][:number]
    ids = {instrument["id"] for instrument in laboratory[INSTRUMENTS]}
    laboratory[WORKS] = [row for row in laboratory[WORKS] if row["customerInstrumentId"] in ids][:number]
    for kind, rows in laboratory.items():
        for row in rows:
            records.load(kind, {name: date_text(v) if isinstance(v, date) else v for name, v in row.items()})
    return records


Drawn = dict[str, Any]

_FOUNDERS: Final = (  # noqa: SIM905 - a list would take a line for each word
    "Ashgrove Bellwether Cardinal Delmonte Eastfield Fairhaven Granite Hollis Ironbridge Juniper Kestrel Larkspur "
    "Meridian Northgate Oakhurst Pinnacle Quarry Ridgeway Sterling Tamarack Umbra Vanguard Whitmore Yarrow Zenith"
).split()
_TRADES: Final = (  # noqa: SIM905 - a list would take a line for each word
    "Aerospace Automotive Biologics Dairy Energy Foundry Instruments Labs Medical Optics Packaging Pharma Rail "
    "Semiconductor Tooling Utilities"
).split()
_PLACES: Final = (
    # city, state, zip, country, start of a phone number, legal form, workspace
    ("Chicago", "Illinois", "60606", "United States", "+1-312-555-01", "Inc.", "NA-HQ"),
    ("Austin", "Texas", "78701", "United States", "+1-512-555-01", "LLC", "NA-HQ"),
    ("Portland", "Oregon", "97205", "United States", "+1-503-555-01", "Inc.", "NA-HQ"),
    ("Querétaro", "Querétaro", "76000", "Mexico", "+52-442-555-01", "S.A. de C.V.", "NA-HQ"),
    ("Montréal", "Québec", "H3B 1A7", "Canada", "+1-514-555-01", "Ltée", "NA-HQ"),
    ("Bengaluru", "Karnataka", "560001", "India", "+91-80-5550-01", "Pvt. Ltd.", "IN-SOUTH"),
    ("Kochi", "Kerala", "682016", "India", "+91-484-555-01", "Pvt. Ltd.", "IN-SOUTH"),
    ("Zürich", "Zürich", "8005", "Switzerland", "+41-44-555-01", "AG", "EU-LAB"),
    ("München", "Bayern", "80331", "Germany", "+49-89-555-01", "GmbH", "EU-LAB"),
    ("Kraków", "Małopolska", "30-001", "Poland", "+48-12-555-01", "Sp. z o.o.", "EU-LAB"),
)
_CATALOG: Final = (
    # category, make, model, what it is, range, tolerance, frequency, span, price
    ("Digital Multimeter", "Fluke", "87V", "Industrial Multimeter", "0-1000 V, 0-10 A", "±0.05 %", "180", "DAY", 85.5),
    ("Digital Multimeter", "Keysight", "34465A", "Bench Multimeter", "0-1000 V, 0-3 A", "±0.003 %", "1", "YEAR", 140),
    ("Clamp Meter", "Fluke", "376 FC", "True-RMS Clamp Meter", "0-1000 A", "±2 %", "12", "MONTH", 70),
    ("Oscilloscope", "Tektronix", "TBS2104B", "Oscilloscope", "100 MHz, 4 channels", "±3 %", "1", "YEAR", 210),
    ("Caliper", "Mitutoyo", "500-196-30", "Digital Caliper", "0-150 mm", "±0.02 mm", "6", "MONTH", 35),
    ("Caliper", "Starrett", "120A-12", "Dial Caliper", "0-300 mm", "±0.03 mm", "6", "MONTH", 35),
    ("Micrometer", "Mitutoyo", "293-340-30", "Digital Micrometer", "0-25 mm", "±1 µm", "26", "WEEK", 40),
    ("Gauge Block Set", "Mitutoyo", "516-942", "Gauge Blocks, Grade 0", "1-100 mm", "±0.12 µm", "2", "YEAR", 480),
    ("Height Gauge", "Trimos", "V3-400", "Height Gauge", "0-400 mm", "±2.5 µm", "1", "YEAR", 160),
    ("Torque Wrench", "Norbar", "TTi 100", "Torque Wrench", "20-100 N·m", "±3 %", "6", "MONTH", 55),
    ("Pressure Gauge", "WIKA", "232.50", "Pressure Gauge", "0-16 bar", "±1 %", "1", "YEAR", 45),
    ("Pressure Gauge", "Druck", "DPI 104", "Digital Test Gauge", "0-70 bar", "±0.05 %", "1", "YEAR", 120),
    ("Pressure Transmitter", "Rosemount", "3051", "Pressure Transmitter", "0-20 kPa", "±0.04 %", "1", "YEAR", 130),
    ("Thermometer", "Testo", "735-2", "Reference Thermometer", "-50 to 300 °C", "±0.05 °C", "12", "MONTH", 110),
    ("Thermocouple", "Omega", "KMTSS-125", "Type K Probe", "-200 to 1250 °C", "±2.2 °C", "180", "DAY", 50),
    ("Data Logger", "Vaisala", "DL2000", "Humidity Logger", "0-100 % RH", "±1.5 % RH", "1", "YEAR", 95),
    ("Balance", "Sartorius", "Entris II", "Precision Balance", "0-2200 g", "±0.01 g", "1", "YEAR", 150),
    ("Weight Set", "Troemner", "UltraClass", "Weights, OIML E2", "1 mg-200 g", "E2", "2", "YEAR", 520),
    ("Pipette", "Eppendorf", "Research plus", "Adjustable Pipette", "100-1000 µL", "±0.6 %", "90", "DAY", 30),
    ("Flow Meter", "Krohne", "Optiflux 2000", "Magnetic Flow Meter", "DN 50", "±0.5 %", "2", "YEAR", 340),
)
_TECHNICIANS: Final = ("Sandeep Nair", "Maria Kowalska", "Tom Alvarez", "Greta Huber", "Anjali Menon")
_WORKSPACES: Final = {"NA-HQ": "North America Lab", "EU-LAB": "European Lab", "IN-SOUTH": "South India Lab"}
_FIRST_CUSTOMER, _CUSTOMERS, _OWNERS = 10301, 140, 110
_FIRST_INSTRUMENT, _INSTRUMENTS = 8001, 260
_FIRST_WORK = 21401
_EXAMPLE_CUSTOMER, _EXAMPLE_INSTRUMENT = 10427, 8234
_FAMILY: Final = 40
"""Every so many instruments one is a part of the one before it."""


def _laboratory(today: date) -> dict[str, list[Drawn]]:
    chance = random.Random("metquay")  # noqa: S311 - made-up records, no secret
    names = chance.sample([(founder, trade) for founder in _FOUNDERS for trade in _TRADES], _CUSTOMERS)
    customers = [_customer(chance, _FIRST_CUSTOMER + number, *name) for number, name in enumerate(names)]
    for daughter, parent in zip(customers[5::12], customers[4::12], strict=True):
        daughter["parentCompanyCode"] = parent["companyCode"]
    instruments: list[Drawn] = []
    works: list[Drawn] = []
    for row_id in range(_FIRST_INSTRUMENT, _FIRST_INSTRUMENT + _INSTRUMENTS):
        owner = customers[chance.randrange(_OWNERS)]
        if row_id == _EXAMPLE_INSTRUMENT:
            owner = customers[_EXAMPLE_CUSTOMER - _FIRST_CUSTOMER]
        instrument = _instrument(chance, today, row_id, owner)
        if row_id % _FAMILY == 0:
            instrument |= {name: instruments[-1][name] for name in ("companyId", "workspaceCode")}
            instrument["parentTagNo"] = instruments[-1]["tagNo"]
        instruments.append(instrument)
        works += _works(chance, today, instrument)
    works.sort(key=lambda work: (work["inDate"], work["customerInstrumentId"]))
    for row_id, work in enumerate(works, _FIRST_WORK):
        work |= {"id": row_id, "workNo": f"CAL-{work['inDate'].year}-{row_id:06}"}
        if "finishedDate" in work:
            work["certificateNo"] = f"MQ-{work['workNo']}"
    categories = [
        {"name": name, "description": f"{name}s, calibrated in the laboratory or on site"}
        for name in dict.fromkeys(item[0] for item in _CATALOG)
    ]
    return {CUSTOMERS: customers, CATEGORIES: categories, INSTRUMENTS: instruments, WORKS: works}


def _customer(chance: random.Random, row_id: int, founder: str, trade: str) -> Drawn:
    city, state, postal_code, country, phone, form, workspace = chance.choice(_PLACES)
    domain = f"{founder}-{trade}.example".lower()
    street = f"{chance.randrange(1, 980)} {chance.choice(_FOUNDERS)} Street"
    customer: Drawn = {
        "id": row_id,
        "companyCode": f"{founder[:3].upper()}-{row_id % 1000:03}",
        "companyName": f"{founder} {trade} {form}",
        "shortName": f"{founder} {trade}",
        "isInactive": chance.random() < 0.06,  # noqa: PLR2004 - a few
        "email": f"quality@{domain}",
        "website": f"https://www.{domain}",
        "paymentMethod": chance.choice(("Bank Transfer", "Credit Card", "Check")),
        "phone": f"{phone}{chance.randrange(100):02}",
        "activateAlerts": chance.random() < 0.5,  # noqa: PLR2004 - every other
        "workspaceCode": workspace,
        "hasBillingAddress": True,
        "billingAddr1": street,
        "billingCity": city,
        "billingState": state,
        "billingZip": postal_code,
        "billingCountry": country,
        "isTaxable": country != "India",
        "openingBalance": chance.randrange(0, 20000) / 4,
    }
    if row_id == _EXAMPLE_CUSTOMER:
        customer |= {"companyCode": "MCS-001", "companyName": "Metquay Inc.", "shortName": "Metquay"}
    if row_id % 3 == 0:
        customer |= {
            "mobile": f"{phone}{chance.randrange(100):02}",
            "phone2": f"{phone}{chance.randrange(100):02}",
            "billingEmailId": f"invoices@{domain}",
            "billingLocation": f"{city} plant",
            "hasShippingAddress": True,
            "shippingAddr1": street,
            "shippingAddr2": f"Dock {chance.randrange(1, 9)}",
            "shippingCity": city,
            "shippingState": state,
            "shippingZip": postal_code,
            "shippingCountry": country,
            "customerSpecificRequirements": "Deliveries by appointment, a day ahead.",
            "customerSpecificRequirement": "Accredited calibration (ISO/IEC 17025) only.",
            "notes": f"Customer since {chance.randrange(2009, 2024)}.",
        }
    return customer


def _instrument(chance: random.Random, today: date, row_id: int, owner: Drawn) -> Drawn:
    item = _CATALOG[0] if row_id == _EXAMPLE_INSTRUMENT else chance.choice(_CATALOG)
    category, make, model, what, reach, tolerance, frequency, span, price = item
    interval = due_date(today, frequency, span) - today
    calibrated = today - timedelta(days=chance.randrange(2, interval.days * 9 // 8))
    serial = f"{make[:3].upper()}{chance.randrange(10**7):07}"
    instrument: Drawn = {
        "id": row_id,
        "name": f"{make} {model} {what}",
        "companyId": owner["companyCode"],
        "instrumentCategoryName": category,
        "serialNo": serial,
        "tagNo": f"{owner['companyCode'][:3]}-{category[:3].upper()}-{row_id % 1000:03}",
        "make": make,
        "model": model,
        "range": reach,
        "tolerance": tolerance,
        "type": what,
        "itemName": f"{make} {model}",
        "itemMake": make,
        "itemModel": model,
        "itemRange": reach,
        "itemType": what,
        "controlNo": f"CTL-{row_id:05}",
        "workspaceCode": owner["workspaceCode"],
        "calibrationFrequency": frequency,
        "calibrationFrequencySpan": span,
        "calibratedDate": calibrated,
        "verificationDueDate": calibrated + interval / 2,
        "createdDate": calibrated - interval * chance.randrange(1, 4),
        "modifiedDate": calibrated,
        "lastReceivedDate": calibrated - timedelta(days=chance.randrange(1, 9)),
        "lastDeliveredDate": min(today, calibrated + timedelta(days=chance.randrange(1, 5))),
        "active": chance.random() > 0.05,  # noqa: PLR2004 - nearly all
        "isMobile": make not in ("Trimos", "Rosemount", "Krohne"),
        "departmentName": f"{chance.choice(('Production', 'Quality', 'Maintenance'))} - {category}",
        "calibrationCost": price,
        "calibrationStatus": chance.choice(("Good", "Good", "Good", "Limited")),
        "receivedCondition": "Good",
        "certificateUrl": f"https://certificates.example/{serial}.pdf",
        "projectNames": [f"Recalibration {calibrated.year}"] if row_id % 4 == 0 else [],
    }
    if row_id % 11 == 0:
        del instrument["serialNo"]
    elif row_id % 13 == 0:
        instrument |= {
            "remarks": "Handle with care.",
            "warrantyCode": "WTY-24M",
            "warrantyExpiration": today + interval,
        }
    return instrument


def _works(chance: random.Random, today: date, instrument: Drawn) -> list[Drawn]:
    calibrated: date = instrument["calibratedDate"]
    due = due_date(calibrated, instrument["calibrationFrequency"], instrument["calibrationFrequencySpan"])
    works = []
    if chance.random() < 0.65:  # noqa: PLR2004 - most come to us
        works.append(_work(chance, instrument, instrument["lastReceivedDate"]) | _finish(chance, calibrated, due))
        if chance.random() < 0.2:  # noqa: PLR2004 - some did before
            before = calibrated - (due - calibrated)
            earlier = _work(chance, instrument, before - timedelta(days=4))
            works.append(earlier | _finish(chance, before, calibrated))
    if due < today + timedelta(days=30) and chance.random() < 0.6:  # noqa: PLR2004 - most of those due
        arrived = max(calibrated, today - timedelta(days=chance.randrange(0, 12)))
        status = chance.choice(("Open", "In Progress", "Awaiting Approval"))
        works.append(_work(chance, instrument, arrived) | {"status": status})
    elif chance.random() < 0.1:  # noqa: PLR2004 - now and then
        arrived = calibrated + (today - calibrated) / 2
        status = chance.choice(("Cancelled", "Closed"))
        works.append(_work(chance, instrument, arrived) | {"status": status, "remarks": "Withdrawn by the customer."})
    return works


def _work(chance: random.Random, instrument: Drawn, arrived: date) -> Drawn:
    return {
        "customerInstrumentId": instrument["id"],
        "inDate": arrived,
        "workStartDate": arrived,
        "deliveryDate": arrived + timedelta(days=14),
        "accreditation": chance.random() < 0.7,  # noqa: PLR2004 - most
        "siteJob": chance.random() < 0.1,  # noqa: PLR2004 - few
        "workFlowType": chance.choice(("Calibration", "Calibration", "Calibration", "Testing", "Evaluation")),
        "scope": f"Full calibration over {instrument['range']}, results with uncertainty.",
        "procedure": f"{instrument['make']}-{instrument['model']}-CAL".upper().replace(" ", "-"),
        "salesOrderNo": f"SO-{arrived.year}-{chance.randrange(10**5):05}",
        "customerPoNo": f"PO-{chance.randrange(10**5):05}",
        "salesPerson": chance.choice(("Michael Chen", "Lucía Ortega", "Jon Bauer")),
        "technician": chance.choice(_TECHNICIANS),
        "workspaceCode": instrument["workspaceCode"],
        "workspace": _WORKSPACES[instrument["workspaceCode"]],
    }


def _finish(chance: random.Random, day: date, due: date) -> Drawn:
    return {
        "status": "Finished",
        "calibratedDate": day,
        "finishedDate": day,
        "finishedBy": chance.choice(_TECHNICIANS),
        "recommendedDueDate": due,
    }


# What variants have of their own. The lengths of the three lists for customers have no divisor in common, nor one with
# the number of customers, so that each meets each.

_NAMES: Final = (
    "{} Plant {}",
    '{} "Works {}", Inc.',
    "={} {}",
    "{} & Söhne {} GmbH",
    "{}'s Laboratory No. {}",
    "{} µ-Optics {}",
    "{} 計測 {} 株式会社",
    "{}, Site {}",
    "{} <R&D> {}",
)
_PHONES: Final = (
    *("+49 (0) 30-{}", "(030) {}", "=+41-44-{}", "0049/89/{}", "+1-312-{} ext. 7", "{}", "+33.1.{}", "0{} / 0{}"),
    *("-{}", ""),
    None,
)
_ODD_CUSTOMERS: Final[tuple[Drawn, ...]] = (
    {},
    {"notes": "Ring twice, then wait.\nGate 2, not 3;\tno deliveries on Fridays."},
    {"notes": 'First line\r\n\r\n"third line", with a comma', "website": None},
    {"billingAddr2": "c/o Müller, 2. Stock", "other": "=SUM(A1:A9)"},
    {"email": "", "paymentMethod": "", "billingState": ""},
    {"hasBillingAddress": False}
    | dict.fromkeys(("billingAddr1", "billingCity", "billingState", "billingZip", "billingCountry", "email")),
    {"customerSpecificRequirements": 'Labels say "checked", never "passed"; report k = 2 at 20 °C ±0.5 °C.'},
    {"billingZip": "01067", "fax": "-", "taxCode": "007"},
    {"other": "@home", "notes": "  two spaces before, and after  "},
    {"customerSpecificRequirement": "C:\\certificates\\new; 100 % of the points, ≤ 0.5 µm"},
    {"notes": "n/a", "openingBalance": -12.5},
    {"customerSpecificRequirements": "Each point is measured three times, and all results are reported. " * 30},
    {"isTaxable": False, "taxCode": "1E5", "openingBalance": 0.1},
)
_SERIALS: Final = ("{}", "{:08}", "{}E2", "SN {}/A", "-{}", "№{}", "={}", "", None, "{}\u00a0B", "'{}")
_ODD_INSTRUMENTS: Final[tuple[Drawn, ...]] = (
    {},
    {"remarks": 'Display 3½ digits; "good as new"', "instrumentNotes": "Zero before use.\nKeep at 20 °C ±2 °C."},
    {"range": "-10…+50 °C, 0.1 µm", "departmentName": ""},
    {"type": "", "tolerance": None, "calibrationCost": None, "certificateUrl": None},
    {"projectNames": ["Line 4, north", 'so-called "R2"', "=A1"]},
    {"remarks": "+/- 5 µm\r\n-- see note", "controlNo": "1-2"},
    {"model": "=1+1", "itemModel": "=1+1", "calibrationCost": 0.1},
)
_ODD_WORKS: Final[tuple[Drawn, ...]] = (
    {},
    {"remarks": 'Customer says: "wait",\nthen: "go on".'},
    {"certificateAddress": "Kestrel Optics GmbH\nWerk 2, Tor 4\n80331 München", "customerPoNo": "0815"},
    {"remarks": "", "salesPerson": None, "customerPoNo": None},
    {"scope": "5 points; k = 2, U ≤ ±0.3 µm, 20 °C", "remarks": "-5 % of range"},
    {"customerSpecificRequirements": "=HYPERLINK(A1), as text", "subConDetails": "a;b,c|d"},
    {"technician": "O'Brien, Seán", "remarks": "late\u2028very late"},
)


def _variant(kind: str, row: Drawn, row_id: int) -> Drawn:
    if kind == CUSTOMERS:
        short, phone = row["shortName"], _PHONES[row_id % len(_PHONES)]
        return {
            "companyName": _NAMES[row_id % len(_NAMES)].format(short, row_id),
            "companyCode": f"{short[:3].upper()}-{row_id}",
            "shortName": f"{short} {row_id}",
            "phone": phone and phone.format(*2 * [row_id * 7919 % 10**7]),
        } | _ODD_CUSTOMERS[row_id % len(_ODD_CUSTOMERS)]
    if kind == INSTRUMENTS:
        serial = _SERIALS[row_id % len(_SERIALS)]
        return {
            "serialNo": serial and serial.format(row_id),
            "tagNo": f"{row['tagNo'][:8]}{row_id}",
            "controlNo": f"CTL-{row_id}",
            "barcode": f"MQ-{row['createdDate'].year}-{row_id}",
            "certificateUrl": f"https://certificates.example/{row_id}.pdf",
        } | _ODD_INSTRUMENTS[row_id % len(_ODD_INSTRUMENTS)]
    year = row["inDate"].year
    numbers = {"workNo": f"CAL-{year}-{row_id:06}", "salesOrderNo": f"SO-{year}-{row_id}"}
    if "certificateNo" in row:
        numbers["certificateNo"] = f"MQ-{numbers['workNo']}"
    return numbers | _ODD_WORKS[row_id % len(_ODD_WORKS)]
