// OpenAI's client for Node, and Vercel's AI SDK.

import { text } from "node:stream/consumers";
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, Output, streamText } from "ai";
import { EnvHttpProxyAgent, fetch as undiciFetch } from "undici";
import { z } from "zod";

const given = JSON.parse(await text(process.stdin));
const { model, messages, greedy } = given;
// Node 20 reads no HTTPS_PROXY, which leads to the stand-in; undici's agent does.
const dispatcher = new EnvHttpProxyAgent();
const fetch = given.proxied ? (url, init) => undiciFetch(url, { ...init, dispatcher }) : undefined;
const client = new OpenAI({ baseURL: given.base_url, apiKey: given.key, maxRetries: 0, fetch });
const Country = z.object({ capital: z.enum(["Tokyo", "Kyoto"]), island: z.boolean() });
const counts = (usage) => [usage.prompt_tokens, usage.completion_tokens];

async function plain() {
  const completion = await client.chat.completions.create({ model, messages, ...greedy });
  return { text: completion.choices[0].message.content, usage: counts(completion.usage) };
}

async function streamed() {
  const options = { stream: true, stream_options: { include_usage: true } };
  const stream = await client.chat.completions.create({ model, messages, ...greedy, ...options });
  const found = { text: "", pieces: 0 };
  for await (const chunk of stream) {
    const piece = chunk.choices[0]?.delta?.content ?? "";
    found.text += piece;
    found.pieces += piece ? 1 : 0;
    if (chunk.usage) found.usage = counts(chunk.usage);
  }
  return found;
}

async function streamHelper() {
  const stream = client.chat.completions.stream({ model, messages, ...greedy });
  return stream.finalContent();
}

async function parsed() {
  const response_format = zodResponseFormat(Country, "country");
  const body = { model, messages, response_format, max_tokens: 60, temperature: 0 };
  return (await client.chat.completions.parse(body)).choices[0].message.parsed;
}

async function errors() {
  try {
    await client.chat.completions.create({ model, messages, temperature: 9 });
    return "accepted";
  } catch (error) {
    return { class: error.constructor.name, status: error.status, param: error.param };
  }
}

async function leave() {
  const stream = await client.chat.completions.create({ model, messages, stream: true, max_tokens: 200 });
  for await (const chunk of stream) return chunk.object;
}

async function aiSdk() {
  const provider = createOpenAICompatible({
    name: "serving",
    baseURL: given.base_url,
    apiKey: given.key,
    supportsStructuredOutputs: true,
    includeUsage: true,
    fetch,
  });
  const options = { model: provider(model), messages, temperature: 0, maxRetries: 0 };
  const short = { ...options, maxOutputTokens: greedy.max_tokens };
  const plain = await generateText(short);
  const stream = streamText(short);
  let streamed = "";
  for await (const piece of stream.textStream) streamed += piece;
  const output = Output.object({ schema: Country });
  const structured = await generateText({ ...options, maxOutputTokens: 60, output });
  const usage = [plain.usage.inputTokens, plain.usage.outputTokens];
  return { text: plain.text, usage, streamed, structured: structured.output };
}

const results = { plain: await plain(), streamed: await streamed(), streamHelper: await streamHelper() };
results.parsed = await parsed();
results.errors = await errors();
results.leave = await leave();
results.aiSdk = await aiSdk();
if (given.gets) results.models = (await client.models.list()).data.map((one) => one.id);
console.log(JSON.stringify(results));
process.exit(0);
