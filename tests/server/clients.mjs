// npm's openai and the AI SDK against a server: node clients.mjs ADDRESS KEY, in a directory that has them installed
// (npm install openai ai @ai-sdk/openai @ai-sdk/openai-compatible @ai-sdk/anthropic zod). Prints a line for each thing that works.
import assert from "node:assert";
import OpenAI from "openai";
import { zodTextFormat } from "openai/helpers/zod";
import { generateText, streamText, stepCountIs, tool, Output } from "ai";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { createAnthropic } from "@ai-sdk/anthropic";
import { z } from "zod";

const [address, apiKey] = process.argv.slice(2);
const baseURL = `${address}/v1`;
const schema = z.object({ name: z.string().max(5), inner: z.object({ yes: z.boolean() }) });
const Look = { description: "Look somewhere.", inputSchema: z.object({ left: z.boolean() }), execute: async () => "seen" };

const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const tools = [{ type: "function", function: { name: "look", strict: true, parameters: z.toJSONSchema(Look.inputSchema) } }];
const messages = [{ role: "user", content: "look" }];
for (let turn = 0; turn < 2; turn++) {
  const { choices } = await client.chat.completions.create({ model: "nano", messages, tools, tool_choice: "required", parallel_tool_calls: false, max_tokens: 100 });
  const [call] = choices[0].message.tool_calls;
  messages.push(choices[0].message, { role: "tool", tool_call_id: call.id, content: "seen" });
}
const stream = client.chat.completions.stream({ model: "nano", messages, tools, tool_choice: "required", parallel_tool_calls: false, max_tokens: 100 });
const final = await stream.finalChatCompletion();
assert.equal(final.choices[0].message.tool_calls[0].function.name, "look");
const parsed = await client.responses.parse({ model: "nano", input: "who?", max_output_tokens: 200, temperature: 0, text: { format: zodTextFormat(schema, "person") } });
assert.equal(typeof parsed.output_parsed.inner.yes, "boolean");
console.log("openai: tool loop, streamed calls, responses with a schema");

const models = {
  "openai (responses)": createOpenAI({ baseURL, apiKey })("nano"),
  "openai (chat)": createOpenAI({ baseURL, apiKey }).chat("nano"),
  "openai-compatible": createOpenAICompatible({ name: "specontext", baseURL, apiKey, supportsStructuredOutputs: true })("nano"),
  anthropic: createAnthropic({ baseURL, apiKey })("nano"),
};
for (const [name, model] of Object.entries(models)) {
  const options = { model, prompt: "look", temperature: 0, maxOutputTokens: 200, maxRetries: 0 };
  if (name === "anthropic") delete options.temperature;
  const called = { tools: { look: tool(Look) }, toolChoice: "required", stopWhen: stepCountIs(3) };
  const loop = await generateText({ ...options, ...called });
  assert.equal(loop.steps.length, 3);
  assert.equal(loop.steps[0].toolResults[0].output, "seen");
  const streamed = streamText({ ...options, ...called });
  const kinds = new Set();
  for await (const part of streamed.fullStream) kinds.add(part.type);
  assert(kinds.has("tool-call") && kinds.has("tool-result") && !kinds.has("error"), [...kinds].join());
  const { output } = await generateText({ ...options, output: Output.object({ schema }) });
  assert.equal(typeof output.inner.yes, "boolean");
  console.log(`AI SDK, ${name}: tool loop of three steps, streamed, an object of a schema`);
}
