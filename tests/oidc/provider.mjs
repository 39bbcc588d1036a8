// oidc-provider with the clients and people of the tests. What a name is allowed to claim stands in it: `ada.plant-admins` is ada with that role.
import { Provider } from "oidc-provider";

const [port, redirect] = process.argv.slice(2);
const issuer = `http://127.0.0.1:${port}`;

const provider = new Provider(issuer, {
  clients: [
    { client_id: "console", client_secret: "a secret of this test, long enough", redirect_uris: [redirect] },
    { client_id: "public", token_endpoint_auth_method: "none", redirect_uris: [redirect] },
    { client_id: "elsewhere", client_secret: "another secret of this test", redirect_uris: ["http://127.0.0.1:1/other"] },
  ],
  // Claims of `profile` come by userinfo, those of `openid` in the ID token.
  claims: { openid: ["sub"], profile: ["preferred_username", "roles", "realm_access"] },
  findAccount: (_context, id) => ({
    accountId: id,
    claims: () => {
      const [name, ...roles] = id.split(".");
      return { sub: id, ...(name === "nameless" ? {} : { preferred_username: name }), roles, realm_access: { roles } };
    },
  }),
  // Its own pages ask for any name and let it in: the log-in there is not what is tested.
  features: { devInteractions: { enabled: true } },
  cookies: { keys: ["of this test"] },
  pkce: { required: () => true },
});

provider.listen(Number(port), "127.0.0.1", () => console.log("listening"));
