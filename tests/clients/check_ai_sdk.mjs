// The AI SDK with its OpenAI-compatible provider.
import assert from "node:assert/strict";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, streamText, tool } from "ai";
import { z } from "zod";

const precis = createOpenAICompatible({ name: "precis", baseURL: `${process.argv[2]}/v1`, apiKey: "none", supportsStructuredOutputs: true });
const question = { model: precis("demo"), prompt: "What is the capital of France?", maxOutputTokens: 12, temperature: 0, maxRetries: 0 };

const whole = await generateText(question);
assert.match(whole.text, /Paris/);
let text = "";
for await (const piece of streamText(question).textStream) text += piece;
assert.equal(text, whole.text);
console.log("ok: generateText and streamText");

const schema = z.object({ name: z.string().max(20), age: z.number().int().min(0).max(150) });
const made = await generateObject({ model: precis("demo"), schema, prompt: "Invent a person.", maxOutputTokens: 200, seed: 1, maxRetries: 0 });
assert.ok(made.object.age >= 0);
console.log("ok: generateObject");

const weather = tool({ description: "The weather of a city", inputSchema: z.object({ city: z.string().max(20) }), execute: async () => "sunny" });
const called = await generateText({ model: precis("tools"), prompt: "The weather in Rome?", tools: { weather }, toolChoice: "required", maxOutputTokens: 100, temperature: 0, maxRetries: 0 });
assert.equal(called.toolCalls[0].toolName, "weather");
console.log("ok: tools");
