// Opens the built site in a real browser and fails on what a reader would stumble over:
// axe-core's serious and critical findings, a page wider than its window, a resource from elsewhere,
// an error in the console, a page that is empty without JavaScript.
//
//   node check.mjs SITE [FOLDER]     with FOLDER, a picture of everything that was looked at

import { readdirSync, readFileSync } from "node:fs";
import { createServer } from "node:http";
import { createRequire } from "node:module";
import { basename, extname, join, resolve } from "node:path";
import { chromium } from "playwright-core";

const site = resolve(process.argv[2]);
const pictures = process.argv[3];
const axe = createRequire(import.meta.url).resolve("axe-core/axe.min.js");
const SIZES = { phone: { width: 390, height: 844 }, desktop: { width: 1280, height: 900 } };
const PAGES = [
  "index.html",
  ...readdirSync(join(site, "notebooks")).sort().map((name) => `notebooks/${name}`),
  ...readdirSync(join(site, "docs/pages")).sort().filter((name) => name.endsWith(".html")).map((name) => `docs/pages/${name}`),
  "CONTRIBUTING.html",
  "CHANGELOG.html",
  "SECURITY.html",
  "LOG.html",
  "search.html?q=prefill",
];
const TYPES = { ".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml" };
const problems = [];
let looked = 0;

const server = createServer((request, reply) => {
  const path = new URL(request.url, "http://site").pathname;
  try {
    const content = readFileSync(join(site, path));
    reply.writeHead(200, { "content-type": TYPES[extname(path)] ?? "application/octet-stream" });
    reply.end(content);
  } catch {
    if (path !== "/favicon.ico") problems.push(`not there: ${path}`);
    reply.writeHead(404).end();
  }
});
await new Promise((ready) => server.listen(0, "127.0.0.1", ready));
const home = `http://127.0.0.1:${server.address().port}/`;

/** A tab in which everything that goes wrong is written down. */
async function tab(browser, settings) {
  const page = await (await browser.newContext(settings)).newPage();
  page.on("request", (request) => {
    const url = request.url();
    if (!url.startsWith(home) && !/^(data|blob):/.test(url)) problems.push(`from elsewhere: ${url}`);
  });
  page.on("pageerror", (error) => problems.push(`${page.url()}: ${error}`));
  return page;
}

async function look(page, name, label) {
  await page.goto(home + name);
  if (name.startsWith("search")) await page.waitForSelector("#search-results li");
  const wide = await page.evaluate(() => document.documentElement.scrollWidth - innerWidth);
  if (wide > 0) problems.push(`${label}: ${wide} pixels wider than the window`);
  await page.addScriptTag({ path: axe });
  const { violations } = await page.evaluate(() => window.axe.run());
  for (const { id, impact, help, nodes } of violations) {
    const line = `${label}: ${impact}: ${id}: ${help} (${nodes.length})`;
    if (!["serious", "critical"].includes(impact)) console.log(`  note ${line}`);
    else problems.push([line, ...nodes.slice(0, 3).map((n) => `    ${n.html.slice(0, 200)}`)].join("\n"));
  }
  if (pictures) {
    const path = join(pictures, `${label.replace(/[^\w]+/g, "-")}.png`);
    await page.screenshot({ path, fullPage: true });
  }
  looked += 1;
}

const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM,
  args: ["--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-sync"],
  chromiumSandbox: false,
});
for (const [size, viewport] of Object.entries(SIZES)) {
  for (const colorScheme of ["light", "dark"]) {
    const page = await tab(browser, { viewport, colorScheme });
    for (const name of PAGES) {
      await look(page, name, `${basename(name.split("?")[0], ".html")} ${size} ${colorScheme}`);
    }
  }
}
const plain = await tab(browser, { viewport: SIZES.phone, javaScriptEnabled: false });
for (const name of PAGES.filter((name) => !name.startsWith("search"))) {
  await plain.goto(home + name);
  const text = await plain.locator("main article").innerText();
  if (text.length < 500) problems.push(`${name}: without JavaScript there is nothing to read`);
  if (pictures) await plain.screenshot({ path: join(pictures, `${basename(name, ".html")}-plain.png`) });
}
await browser.close();
server.close();
for (const problem of problems) console.error(problem);
console.log(`${PAGES.length} pages, looked at ${looked} times: ${problems.length} problems`);
process.exit(problems.length ? 1 : 0);
