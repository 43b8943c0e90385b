"""The legacy tool: GETs one after the other, each on a new connection, alone or many tools at once.

Run as a program of its own, on the near host: ``tool.py URL CALLS TOOLS LOGIN [CA]``, where LOGIN is the number of
calls for which one login serves, 0 for none at all. It prints JSON: the seconds of the slowest tool, those of the very
first call, how many calls failed.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import ssl
import sys
import threading
import time
from urllib.parse import urlsplit


class Tool(threading.Thread):
    """One tool at work."""

    def __init__(self, url: str, calls: int, login: int, context: ssl.SSLContext) -> None:
        """``login``: for how many calls one serves; 0: there is none."""
        super().__init__()
        self._url = urlsplit(url)
        self._calls = calls
        self._login = login
        self._context = context
        self.total = self.first = 0.0
        self.failures: list[str] = []

    def run(self) -> None:
        """Do the job."""
        began = time.perf_counter()
        headers = {"User-Agent": "label-printer/2.1"}
        for number in range(self._calls):
            if self._login and number % self._login == 0:
                keys = json.dumps({"accessKey": "measured", "secretKey": "measured-secret"})
                answer = self._ask("POST", "/api/v1/authenticate", keys, {"Content-Type": "application/json"})
                headers["Authorization"] = f"Bearer {json.loads(answer).get('accessToken')}"
            self._ask("GET", "/api/v1/customers?first=0&limit=50", None, headers)
            if number == 0:
                self.first = time.perf_counter() - began
        self.total = time.perf_counter() - began

    def _ask(self, method: str, path: str, body: str | None, headers: dict[str, str]) -> bytes:
        with contextlib.closing(self._connection()) as client:
            try:
                client.request(method, path, body, headers)
                answer = client.getresponse()
                data = answer.read()
            except OSError as error:
                self.failures.append(f"{method} {path}: {error}")
                return b"{}"
        if answer.status != http.client.OK:
            self.failures.append(f"{method} {path}: {answer.status}")
        return data

    def _connection(self) -> http.client.HTTPConnection:
        if self._url.scheme == "https":
            return http.client.HTTPSConnection(self._url.netloc, context=self._context, timeout=60)
        return http.client.HTTPConnection(self._url.netloc, timeout=60)


def main(url: str, calls: int, tools: int, login: int, ca: str | None) -> None:
    """Let the tools run all at once, and print what they took."""
    context = ssl.create_default_context(cafile=ca)
    threads = [Tool(url, calls, login, context) for _ in range(tools)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    failures = [failure for thread in threads for failure in thread.failures]
    total = max(thread.total for thread in threads)
    print(json.dumps({"total": total, "first": threads[0].first, "failures": failures[:3], "failed": len(failures)}))


if __name__ == "__main__":
    address, calls, tools, login, *ca = sys.argv[1:]
    main(address, int(calls), int(tools), int(login), ca[0] if ca else None)
