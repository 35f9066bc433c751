// Vercel's AI SDK: the provider for compatible servers, and OpenAI's with each of its routes.

import assert from 'node:assert/strict';
import test from 'node:test';

import { createOpenAI } from '@ai-sdk/openai';
import { createOpenAICompatible } from '@ai-sdk/openai-compatible';
import { APICallError, generateObject, generateText, Output, RetryError, streamObject, streamText } from 'ai';
import { z } from 'zod';

const { OWL2_URL: baseURL, OWL2_KEY: apiKey, OWL2_MODEL: name, OWL2_IMAGE: url } = process.env;
const compatible = createOpenAICompatible({
  name: 'owl2', baseURL, apiKey, includeUsage: true, supportsStructuredOutputs: true,
});
const openai = createOpenAI({ baseURL, apiKey });
const models = {
  'compatible': compatible(name),
  'openai chat': openai.chat(name),
  'openai responses': openai.responses(name),
};
const schema = z.object({ color: z.enum(['red', 'green', 'blue']), count: z.literal(2) });
const messages = [
  { role: 'user', content: [{ type: 'text', text: 'what is this?' }, { type: 'image', image: url }] },
];
const options = { maxRetries: 0, maxOutputTokens: 60, temperature: 0 };

for (const [kind, model] of Object.entries(models)) {
  test(`${kind}: generateText with an image`, async () => {
    const reply = await generateText({ model, messages, ...options });
    assert.ok(reply.text);
    assert.equal(reply.finishReason, 'stop');
    assert.ok(reply.usage.outputTokens > 0);
  });

  test(`${kind}: streamText`, async () => {
    const reply = await generateText({ model, prompt: 'Hello', ...options });
    const stream = streamText({ model, prompt: 'Hello', ...options });
    let text = '';
    for await (const part of stream.textStream) text += part;
    assert.equal(text, reply.text);
    assert.equal((await stream.usage).outputTokens, reply.usage.outputTokens);
  });

  test(`${kind}: system prompt and turns`, async () => {
    const turns = [
      { role: 'user', content: 'Hello' },
      { role: 'assistant', content: 'hi' },
      { role: 'user', content: 'what is this?' },
    ];
    assert.ok((await generateText({ model, system: 'Be brief.', messages: turns, ...options })).text);
  });

  test(`${kind}: truncated`, async () => {
    const reply = await generateText({ model, prompt: 'Hello', ...options, maxOutputTokens: 1 });
    assert.equal(reply.finishReason, 'length');
  });

  test(`${kind}: generateObject`, async () => {
    const { object } = await generateObject({ model, schema, prompt: 'Return JSON.', ...options });
    assert.ok(schema.parse(object));
  });

  test(`${kind}: generateObject with a list of values`, async () => {
    const request = { model, output: 'enum', enum: ['yes', 'no'], prompt: 'Hello', ...options };
    assert.ok(['yes', 'no'].includes((await generateObject(request)).object));
  });

  test(`${kind}: streamObject`, async () => {
    const stream = streamObject({ model, schema, prompt: 'Return JSON.', ...options });
    let last = null;
    for await (const part of stream.partialObjectStream) last = part;
    assert.ok(schema.parse(last));
  });

  test(`${kind}: Output.object`, async () => {
    const output = Output.object({ schema });
    const reply = await generateText({ model, output, prompt: 'Return JSON.', ...options });
    assert.ok(schema.parse(reply.output));
  });

  test(`${kind}: errors`, async () => {
    const request = { model, prompt: 'a '.repeat(9000), ...options };
    await assert.rejects(generateText(request), (error) => error instanceof APICallError && error.statusCode === 400);
  });

  test(`${kind}: abort`, async () => {
    const abortSignal = AbortSignal.timeout(1);
    await assert.rejects(generateText({ model, prompt: 'Hello', ...options, abortSignal }));
  });
}

test('text completions', async () => {
  const reply = await generateText({ model: compatible.completionModel(name), prompt: 'USER: Hello', ...options });
  assert.ok(reply.text);
});

test('unknown model and wrong key', async () => {
  const request = { prompt: 'Hello', maxRetries: 0 };
  const wrong = createOpenAICompatible({ name: 'owl2', baseURL, apiKey: 'wrong' });
  for (const [model, status] of [[compatible('other'), 404], [wrong(name), 401]]) {
    await assert.rejects(generateText({ model, ...request }), (error) => error.statusCode === status);
  }
});

test('retries', async () => {
  let count = 0;
  const flaky = (...call) => ((count += 1) < 2 ? new Response('', { status: 503 }) : fetch(...call));
  const provider = createOpenAICompatible({ name: 'owl2', baseURL, apiKey, fetch: flaky });
  assert.ok((await generateText({ model: provider(name), prompt: 'Hello', maxRetries: 1 })).text);
  const broken = createOpenAICompatible({ name: 'owl2', baseURL, apiKey, fetch: async () => new Response('', { status: 503 }) });
  await assert.rejects(generateText({ model: broken(name), prompt: 'Hello', maxRetries: 1 }), RetryError);
});
