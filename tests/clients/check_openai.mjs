// The official client for Node.
import assert from "node:assert/strict";
import OpenAI from "openai";

const client = new OpenAI({ baseURL: `${process.argv[2]}/v1`, apiKey: "none", timeout: 300_000, maxRetries: 0 });
const messages = [{ role: "user", content: "What is the capital of France?" }];
const ask = { model: "demo", messages, max_tokens: 12, temperature: 0 };
const parameters = { type: "object", properties: { city: { type: "string", maxLength: 20 } }, required: ["city"], additionalProperties: false };
const tools = [{ type: "function", function: { name: "weather", parameters } }];

const whole = await client.chat.completions.create(ask);
assert.match(whole.choices[0].message.content, /Paris/);
let text = "";
for await (const chunk of await client.chat.completions.create({ ...ask, stream: true })) text += chunk.choices[0]?.delta?.content ?? "";
assert.equal(text, whole.choices[0].message.content);
console.log("ok: chat whole and streamed");

const options = { n: 2, seed: 3, top_p: 0.9, presence_penalty: 0.1, frequency_penalty: 0.1, logprobs: true, top_logprobs: 2, stop: ["\n"], user: "x" };
const two = await client.chat.completions.create({ ...ask, ...options, temperature: 1 });
assert.equal(two.choices.length, 2);
assert.equal(two.choices[0].logprobs.content[0].top_logprobs.length, 2);
console.log("ok: n, seed, sampling, logprobs");

const completion = await client.completions.create({ model: "demo", prompt: ["One, two,", "A, B,"], max_tokens: 4, echo: true, logprobs: 1, best_of: 2 });
assert.equal(completion.choices.length, 2);
console.log("ok: completions");

const schema = { type: "object", properties: { age: { type: "integer", minimum: 0, maximum: 150 } }, required: ["age"], additionalProperties: false };
const format = { type: "json_schema", json_schema: { name: "person", strict: true, schema } };
const person = await client.chat.completions.create({ ...ask, max_tokens: 60, response_format: format });
assert.ok(JSON.parse(person.choices[0].message.content).age >= 0);
console.log("ok: response_format");

const called = await client.chat.completions.create({ ...ask, model: "tools", max_tokens: 100, tools, tool_choice: "required", parallel_tool_calls: false });
assert.equal(called.choices[0].finish_reason, "tool_calls");
assert.ok("city" in JSON.parse(called.choices[0].message.tool_calls[0].function.arguments));
const named = { type: "function", function: { name: "weather" } };
const stream = client.chat.completions.stream({ ...ask, model: "tools", max_tokens: 100, tools, tool_choice: named });
assert.equal((await stream.finalChatCompletion()).choices[0].message.tool_calls[0].function.name, "weather");
console.log("ok: tools, streamed and not");

assert.ok((await client.models.list()).data.some((model) => model.id === "demo@bf16"));
await assert.rejects(client.chat.completions.create({ ...ask, model: "nobody" }), (error) => error.status === 404 && error.param === "model");
console.log("ok: models, errors");
