// OpenAI's client and a library for server-sent events, in Chromium, on a page of another origin.

import { readFileSync } from "node:fs";
import { createServer } from "node:http";
import { extname } from "node:path";
import { text } from "node:stream/consumers";
import { chromium } from "playwright-core";

const given = JSON.parse(await text(process.stdin));
const IMPORTS = {
  openai: "/node_modules/openai/index.mjs",
  events: "/node_modules/@microsoft/fetch-event-source/lib/esm/index.js",
};
const PAGE = `<!doctype html><script type="importmap">${JSON.stringify({ imports: IMPORTS })}</script>`;

const server = createServer((request, response) => {
  const path = request.url.split("?")[0];
  if (path === "/") return response.writeHead(200, { "content-type": "text/html" }).end(PAGE);
  try {
    const file = extname(path) ? path : `${path}.js`; // this library leaves the ending out
    const content = readFileSync(new URL(`.${file}`, import.meta.url));
    response.writeHead(200, { "content-type": "text/javascript" }).end(content);
  } catch {
    response.writeHead(404).end();
  }
});
await new Promise((ready) => server.listen(given.origin_port, "127.0.0.1", ready));

/** Runs in the page. */
async function inPage({ base_url, key, model, messages, greedy }) {
  const { OpenAI } = await import("openai");
  const { fetchEventSource } = await import("events");
  const client = new OpenAI({ baseURL: base_url, apiKey: key, maxRetries: 0, dangerouslyAllowBrowser: true });
  const results = {};
  const body = { model, messages, ...greedy };
  results.plain = (await client.chat.completions.create(body)).choices[0].message.content;
  results.streamed = "";
  for await (const chunk of await client.chat.completions.create({ ...body, stream: true })) {
    results.streamed += chunk.choices[0]?.delta?.content ?? "";
  }
  results.models = (await client.models.list()).data.map((one) => one.id);
  try {
    await client.chat.completions.create({ ...body, temperature: 9 });
  } catch (error) {
    results.refused = { status: error.status, param: error.param };
  }
  const events = [];
  await fetchEventSource(`${base_url}/chat/completions`, {
    method: "POST",
    headers: { "Content-Type": "application/json", Authorization: `Bearer ${key}` },
    body: JSON.stringify({ ...body, stream: true }),
    openWhenHidden: true,
    onmessage: (event) => events.push(event.data),
    onerror: (error) => { throw error; },
  });
  results.last = events.pop();
  results.events = events.map((event) => JSON.parse(event).choices[0]?.delta?.content ?? "").join("");
  return results;
}

/** Runs in the page: what it may learn from a server that does not allow its origin. */
async function closed({ base_url, model, messages }) {
  const body = JSON.stringify({ model, messages, max_tokens: 1 });
  const attempt = async (type) => {
    try {
      const response = await fetch(`${base_url}/chat/completions`, { method: "POST", headers: { "Content-Type": type }, body });
      return response.status;
    } catch (error) {
      return error.name;
    }
  };
  return { json: await attempt("application/json"), text: await attempt("text/plain") };
}

const browser = await chromium.launch({
  executablePath: given.browser,
  args: ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-sync",
    "--no-proxy-server"],
  chromiumSandbox: false,
});
const page = await browser.newPage();
const messages = [];
page.on("console", (message) => messages.push(message.text()));
await page.goto(`http://127.0.0.1:${given.origin_port}/`);
try {
  console.log(JSON.stringify(await page.evaluate(given.allowed ? inPage : closed, given)));
} catch (error) {
  console.error(String(error), messages.join("\n"));
  process.exitCode = 1;
}
await browser.close();
server.close();
process.exit();
