"""Uplinks as LoRaWAN network servers publish them."""

from base64 import b64encode

PAYLOAD = bytes.fromhex("0202df000393710c60")
B64 = b64encode(PAYLOAD).decode()

TTN = {
    "end_device_ids": {
        "device_id": "soil-1",
        "application_ids": {"application_id": "farm"},
        "dev_eui": "0004A30B001C0530",
        "dev_addr": "00BCB929",
    },
    "received_at": "2024-02-12T15:15:46.200000000Z",
    "uplink_message": {
        "f_port": 2,
        "f_cnt": 39,
        "frm_payload": B64,
        "rx_metadata": [
            {"gateway_ids": {"gateway_id": "far"}, "rssi": -115, "snr": -4.2},
            {"gateway_ids": {"gateway_id": "near"}, "rssi": -42, "channel_rssi": -42, "snr": 7.5},
        ],
        "settings": {"data_rate": {"lora": {"bandwidth": 125000, "spreading_factor": 7}}, "frequency": "868300000"},
        "received_at": "2024-02-12T15:15:45.787654321Z",
    },
}
CHIRPSTACK_V4 = {
    "deduplicationId": "3ac7e3c4-4401-4b8d-9386-a5c902f9202d",
    "time": "2022-07-18T09:34:15.775023242+00:00",
    "deviceInfo": {"applicationName": "farm", "deviceName": "soil-1", "devEui": "0101010101010101"},
    "devAddr": "00189440",
    "dr": 1,
    "fCnt": 4,
    "fPort": 1,
    "data": B64,
    "rxInfo": [{"gatewayId": "0016c001f153a14c", "rssi": -36, "snr": 10.5}],
    "txInfo": {"frequency": 867100000},
}
CHIRPSTACK_V3 = {
    "applicationID": "123",
    "applicationName": "farm",
    "deviceName": "soil-1",
    "devEUI": "AgICAgICAgI=",
    "rxInfo": [{"gatewayID": "AwMDAwMDAwM=", "time": "2019-11-08T13:59:25.048445Z", "rssi": -48, "loRaSNR": 9}],
    "txInfo": {"frequency": 868100000, "dr": 5},
    "fCnt": 10,
    "fPort": 5,
    "data": B64,
}
