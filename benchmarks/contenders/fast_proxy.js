// What the documentation of fast-proxy shows, on undici.
const fs = require("fs");
const http = require("http");
const [port, base, token, ca] = process.argv.slice(2);
const undici = { connections: 512, pipelining: 1, tls: { ca: fs.readFileSync(ca) } };
const { proxy } = require("fast-proxy")({ base, undici });
const options = { rewriteRequestHeaders: (request, headers) => ({ ...headers, authorization: `Bearer ${token}` }) };
http.createServer((request, response) => proxy(request, response, request.url, options)).listen({ port: Number(port), host: "127.0.0.1", backlog: 4096 });
