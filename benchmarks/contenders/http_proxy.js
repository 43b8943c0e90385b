// What the documentation of http-proxy shows, with connections that are kept.
const fs = require("fs");
const http = require("http");
const https = require("https");
const [port, target, token, ca] = process.argv.slice(2);
const kind = target.startsWith("https") ? https : http;
const agent = new kind.Agent({ keepAlive: true, maxFreeSockets: 512, ca: fs.readFileSync(ca) });
const proxy = require("http-proxy").createProxyServer({
  target, agent, changeOrigin: true, headers: { authorization: `Bearer ${token}` },
});
proxy.on("error", (error, request, response) => { response.writeHead(502); response.end(String(error)); });
http.createServer((request, response) => proxy.web(request, response)).listen({ port: Number(port), host: "127.0.0.1", backlog: 4096 });
