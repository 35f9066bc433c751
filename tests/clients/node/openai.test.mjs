// openai-node, against the server at OWL2_URL. Run by test_node.py.

import assert from 'node:assert/strict';
import test from 'node:test';

import OpenAI from 'openai';
import { zodResponseFormat, zodTextFormat } from 'openai/helpers/zod';
import { z } from 'zod';

const { OWL2_URL: baseURL, OWL2_KEY: apiKey, OWL2_MODEL: model, OWL2_IMAGE: url } = process.env;
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const messages = [{ role: 'user', content: 'Hello' }];
const image = [
  { role: 'user', content: [{ type: 'text', text: 'what is this?' }, { type: 'image_url', image_url: { url } }] },
];
const Shape = z.object({ color: z.enum(['red', 'green', 'blue']), isRound: z.boolean() });

test('chat with an image', async () => {
  const reply = await client.chat.completions.create({ model, messages: image, max_tokens: 8 });
  assert.ok(reply.choices[0].message.content);
  assert.equal(reply.usage.total_tokens, reply.usage.prompt_tokens + reply.usage.completion_tokens);
});

test('streamed and complete answers are equal', async () => {
  const options = { model, messages, max_tokens: 8 };
  const reply = await client.chat.completions.create(options);
  let text = '';
  let usage = null;
  const stream_options = { include_usage: true };
  const stream = await client.chat.completions.create({ ...options, stream: true, stream_options });
  for await (const chunk of stream) {
    text += chunk.choices[0]?.delta.content ?? '';
    usage = chunk.usage ?? usage;
  }
  assert.equal(text, reply.choices[0].message.content);
  assert.deepEqual(usage, reply.usage);
});

test('stream helper', async () => {
  const stream = client.chat.completions.stream({ model, messages, max_tokens: 40 });
  const kinds = [];
  stream.on('content', () => kinds.push('content'));
  assert.ok(await stream.finalContent());
  assert.ok(kinds.length > 1);
});

test('an aborted stream ends', async () => {
  const stream = await client.chat.completions.create({
    model, messages, max_tokens: 500, stream: true, temperature: 2, logit_bias: { 2: -100 },
  });
  let count = 0;
  for await (const chunk of stream) {
    count += chunk.choices.length;
    if (count === 2) stream.controller.abort();
  }
  assert.ok(count < 500);
});

test('several answers with log-probabilities', async () => {
  const options = { n: 2, temperature: 1, seed: 1, logprobs: true, top_logprobs: 2, max_tokens: 4 };
  const reply = await client.chat.completions.create({ model, messages, ...options });
  assert.equal(reply.choices.length, 2);
  assert.equal(reply.choices[0].logprobs.content[0].top_logprobs.length, 2);
});

test('parse', async () => {
  const reply = await client.chat.completions.parse({
    model, messages, max_tokens: 60, response_format: zodResponseFormat(Shape, 'shape'),
  });
  assert.ok(Shape.parse(reply.choices[0].message.parsed));
});

test('response with an image', async () => {
  const content = [{ type: 'input_text', text: 'what is this?' }, { type: 'input_image', image_url: url, detail: 'auto' }];
  const input = [{ role: 'user', content }];
  const reply = await client.responses.create({ model, input, max_output_tokens: 40 });
  assert.ok(reply.output_text);
  assert.equal(reply.usage.total_tokens, reply.usage.input_tokens + reply.usage.output_tokens);
});

test('streamed response', async () => {
  const options = { model, input: 'Hello', max_output_tokens: 40 };
  const reply = await client.responses.create(options);
  let text = '';
  const numbers = [];
  for await (const event of await client.responses.create({ ...options, stream: true })) {
    numbers.push(event.sequence_number);
    if (event.type === 'response.output_text.delta') text += event.delta;
  }
  assert.equal(text, reply.output_text);
  assert.deepEqual(numbers, [...numbers.keys()]);
});

test('stream helper and parse of responses', async () => {
  const options = { model, input: 'Hello', max_output_tokens: 60, text: { format: zodTextFormat(Shape, 'shape') } };
  const reply = await client.responses.parse(options);
  assert.ok(Shape.parse(reply.output_parsed));
  const stream = client.responses.stream(options);
  const final = await stream.finalResponse();
  assert.deepEqual(final.output_parsed, reply.output_parsed);
});

test('responses are not stored', async () => {
  await assert.rejects(client.responses.retrieve('resp_1'), OpenAI.NotFoundError);
});

test('completions', async () => {
  const options = { model, prompt: 'USER: Hello', max_tokens: 5, echo: true, logprobs: 1 };
  const reply = await client.completions.create(options);
  let text = '';
  for await (const chunk of await client.completions.create({ ...options, stream: true })) {
    text += chunk.choices[0].text;
  }
  assert.equal(text, reply.choices[0].text);
  assert.ok(text.startsWith('USER: Hello'));
});

test('models', async () => {
  const { data } = await client.models.list();
  assert.deepEqual(data.map((entry) => entry.id), [model]);
});

for (const [name, changes, kind] of [
  ['model', { model: 'other' }, OpenAI.NotFoundError],
  ['value', { temperature: 3 }, OpenAI.BadRequestError],
  ['tools', { tools: [{ type: 'function', function: { name: 'f' } }] }, OpenAI.BadRequestError],
  ['context', { messages: [{ role: 'user', content: 'a '.repeat(9000) }] }, OpenAI.BadRequestError],
]) {
  test(`error: ${name}`, async () => {
    await assert.rejects(client.chat.completions.create({ model, messages, ...changes }), kind);
  });
}

test('error: key', async () => {
  const other = new OpenAI({ baseURL, apiKey: 'wrong', maxRetries: 0 });
  await assert.rejects(other.models.list(), OpenAI.AuthenticationError);
});

test('retries', async () => {
  let count = 0;
  const flaky = (...call) =>
    (count += 1) < 3 ? new Response('', { status: 503, headers: { 'retry-after-ms': '1' } }) : fetch(...call);
  const other = new OpenAI({ baseURL, apiKey, maxRetries: 2, fetch: flaky });
  assert.ok((await other.models.list()).data.length);
  assert.equal(count, 3);
});
